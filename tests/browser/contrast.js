// How well what is on the page can be told from what is under it, by WCAG's formula. Runs within the page.

const pen = document.createElement("canvas").getContext("2d", { willReadFrequently: true });

function paint(colour) {
  pen.clearRect(0, 0, 1, 1);
  pen.fillStyle = colour;
  pen.fillRect(0, 0, 1, 1);
  return [...pen.getImageData(0, 0, 1, 1).data];
}

function light([red, green, blue]) {
  const line = (value) => ((value /= 255) <= 0.03928 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
  return 0.2126 * line(red) + 0.7152 * line(green) + 0.0722 * line(blue);
}

function ratio(one, other) {
  const [a, b] = [light(one), light(other)];
  return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
}

function under(node) {
  while (node && paint(getComputedStyle(node).backgroundColor)[3] < 250) node = node.parentElement;
  return paint(getComputedStyle(node ?? document.body).backgroundColor);
}

/** All text that is too faint, with its contrast. */
function faintText() {
  const found = [];
  const check = (node, style, words) => {
    let opacity = 1;
    for (let one = node; one; one = one.parentElement) opacity *= Number(getComputedStyle(one).opacity);
    const ground = under(node);
    const ink = paint(style.color).map((value, place) => value * opacity + ground[place] * (1 - opacity));
    const contrast = ratio(ink, ground);
    if (contrast < 4.5) found.push(`${node.tagName}.${node.className} ${words.slice(0, 30)}: ${contrast.toFixed(2)}`);
  };
  for (const node of document.querySelectorAll("body *")) {
    if (!node.checkVisibility() || node.matches(":disabled, :disabled *, option, script")) continue;
    const hasText = [...node.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim());
    const isWritten = node.tagName === "TEXTAREA" && node.value;
    if (hasText || isWritten) check(node, getComputedStyle(node), node.textContent.trim());
    if (node.placeholder) check(node, getComputedStyle(node, "::placeholder"), node.placeholder);
  }
  return found;
}

/** Name -> [contrast, the least that it may be]: every line of a chart, by the mark in its legend; what is drawn on the
    device, by the colours that it takes; and the shapes that are elements. */
function shapes() {
  const found = {};
  const note = (name, least, one, other) => { found[name] = [ratio(one, other), least]; };
  for (const mark of document.querySelectorAll(".curve .u-marker")) {
    const name = `${mark.closest(".curve").id} ${mark.nextSibling.textContent}`;
    note(name, 3, paint(getComputedStyle(mark).borderColor), under(mark));
  }
  const style = getComputedStyle(document.getElementById("device"));
  const colour = (name) => paint(style.getPropertyValue(`--${name}`));
  const hues = ["c0", "c1", "c2", "c3", "c4", "c5"];
  for (const name of [...hues, "plain", "bad", "ink"]) note(`device ${name}`, 3, colour(name), colour("ground"));
  for (const name of hues) note(`words on ${name}`, 4.5, colour("on"), colour(name));
  note("words on the device", 4.5, colour("quiet"), colour("ground"));
  note("words of an axis", 4.5, colour("quiet"), colour("paper"));
  const bar = under(document.getElementById("s-bar"));
  for (const id of ["s-held", "s-cached"]) note(id, 3, under(document.getElementById(id)), bar);
  for (const box of document.querySelectorAll("textarea")) {
    note(`around ${box.id}`, 3, paint(getComputedStyle(box).borderTopColor), under(box.parentElement));
  }
  return found;
}
