// What a reader would stumble over in the page that a frame shows: text wider than the page, on other text, cut off, or faint.
function look(frame) {
  const doc = frame.contentDocument, root = doc.documentElement, width = frame.clientWidth, found = [];
  const say = (what, a, b) => found.push([width, what, a.slice(0, 60), (b || "").slice(0, 60)]);
  doc.querySelectorAll("details").forEach((each) => { each.open = true; });
  if (root.scrollWidth > width) say("wider than the page", `${root.scrollWidth} px`);

  const texts = [];
  for (const element of doc.body.querySelectorAll("*:not(style, title, script)")) {
    for (const node of element.childNodes) {
      if (node.nodeType !== 3 || !node.textContent.trim()) continue;
      const range = doc.createRange();
      range.selectNodeContents(node);
      const rects = element.closest("svg") ? [element.getBoundingClientRect()] : [...range.getClientRects()];
      if (rects.length && rects[0].width) texts.push({ element, text: node.textContent.trim(), rects });
    }
  }

  const apart = (p, q) => Math.min(p.right, q.right) - Math.max(p.left, q.left) < 1.5
    || Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top) < 2.5;
  texts.forEach((t, place) => {
    for (const u of texts.slice(place + 1)) {
      if (!t.rects.every((r) => u.rects.every((s) => apart(r, s)))) say("overlap", t.text, u.text);
    }
    const room = (t.element.closest("svg") || t.element.closest(".scroll > table") || doc.body).getBoundingClientRect();
    const outside = (r) => r.left < room.left - 1 || r.right > room.right + 1 || r.top < room.top - 1 || r.bottom > room.bottom + 1;
    if (t.rects.some(outside)) say("cut off", t.text);
  });

  const channel = (value) => (value <= 0.03928 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);  // WCAG 2.2
  const light = (color) => {
    const [r, g, b] = color.match(/[\d.]+/g).slice(0, 3).map((each) => channel(each / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const paper = light(getComputedStyle(root).backgroundColor);
  for (const t of texts) {
    const style = getComputedStyle(t.element), ink = light(t.element.closest("svg") ? style.fill : style.color);
    const contrast = (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
    if (contrast < 4.5) say("faint", t.text, contrast.toFixed(1));
  }
  return { found, texts: texts.length, paper, svgs: doc.querySelectorAll("svg").length };
}

window.onload = () => {
  document.title = JSON.stringify([...document.querySelectorAll("iframe")].map(look));
};
