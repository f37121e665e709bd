#!/usr/bin/env bash
# Prometheus and Grafana beside the running service: on loopback, with deploy/'s rules and dashboard, URLs printed. What they
# keep lies in WATCH_DATA; Ctrl-C ends both. Elsewhere: docker compose -f deploy/compose.yaml up
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
service=${SERVICE:-127.0.0.1:8000}
prometheus=127.0.0.1:${PROMETHEUS_PORT:-9090}
grafana_port=${GRAFANA_PORT:-3000}
data=${WATCH_DATA:-${XDG_STATE_HOME:-$HOME/.local/state}/longserve/watch}

if ! curl --silent --fail --output /dev/null "http://$service/health"; then
    echo "no service answers at $service: make serve starts one, SERVICE=host:port names another" >&2
    exit 1
fi
mkdir -p "$data"/{prometheus,grafana}
cp "$here"/prometheus/{recording,alerts}.yml "$data/prometheus/"
sed "s/127\.0\.0\.1:8000/$service/" "$here/prometheus/prometheus.yml" > "$data/prometheus/prometheus.yml"

trap 'kill $(jobs -p) 2>/dev/null || true; wait' EXIT
trap 'exit 0' INT TERM
prometheus --config.file="$data/prometheus/prometheus.yml" --storage.tsdb.path="$data/prometheus/data" \
    --web.listen-address="$prometheus" --enable-feature=exemplar-storage --log.level=warn &
echo "Prometheus: http://$prometheus/alerts"

homes=(/usr/share/grafana /opt/grafana "${GRAFANA_HOME:-}")
for home in "${homes[@]}"; do
    [ -x "$home/bin/grafana" ] && break
done
if [ -x "$home/bin/grafana" ]; then
    GF_SERVER_HTTP_ADDR=127.0.0.1 GF_SERVER_HTTP_PORT=$grafana_port GF_PATHS_DATA=$data/grafana \
    GF_PATHS_PROVISIONING=$here/grafana/provisioning GF_AUTH_ANONYMOUS_ENABLED=true GF_LOG_LEVEL=warn \
    GF_ANALYTICS_REPORTING_ENABLED=false GF_ANALYTICS_CHECK_FOR_UPDATES=false \
    PROMETHEUS_URL=http://$prometheus LONGSERVE_DASHBOARDS=$here/grafana/dashboards \
        "$home/bin/grafana" server --homepath "$home" &
    echo "Grafana:    http://127.0.0.1:$grafana_port/d/longserve"
else
    echo "Grafana:    not installed; grafana.com/grafana/download has packages, GRAFANA_HOME names its folder"
fi
wait -n
