"""Load tests of any OpenAI-compatible server, over HTTP alone: nothing of the service is imported here.

A scenario (`scenario.py`) is planned into blocks (`plan.py`), each block's sends are drawn from a seed before it runs
(`arrivals.py`, `lengths.py`, `trace.py`, `workload.py`), sent and timed (`generator.py`, `client.py`), told beside what the
server says of itself (`scrape.py`), and read out as a page (`analysis.py`, `verdict.py`, `page.py`).
"""
