"use strict";
// Shows the values of all runs where the reader points at a plot; without it the plots stand as they are.
const tip = document.createElement("div");
tip.id = "tip";
tip.hidden = true;
let read = null, source = null;

document.addEventListener("pointermove", point);
document.addEventListener("pointerdown", point);
document.addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });

function point(event) {
  document.querySelectorAll(".cursor").forEach((line) => line.remove());
  const plot = event.target.closest?.(".plot"), node = document.getElementById("values");
  tip.hidden = true;
  if (!plot || !node) return;
  if (source !== node) { source = node; read = JSON.parse(node.textContent); }
  const axis = plot.closest(".panels"), index = [...axis.querySelectorAll(".plot")].indexOf(plot);
  const panel = read?.axes[axis.dataset.axis]?.[index];
  if (!panel) return;
  const around = plot.getBoundingClientRect(), [left, top, right, bottom] = panel.box;
  const share = ((event.clientX - around.left) / around.width - left) / (right - left);
  if (share < 0 || share > 1) return;
  const x = panel.ends[0] + share * (panel.ends[1] - panel.ends[0]);
  const rows = panel.points.map((points, run) => row(read.runs[run], points, x)).filter(Boolean);
  if (rows.length) show(event, plot, rows, left + share * (right - left), top, bottom);
}

function row(run, points, x) {
  if (!points.x.length) return null;
  let low = 0, high = points.x.length - 1;
  while (low < high) { const middle = (low + high) >> 1; if (points.x[middle] < x) low = middle + 1; else high = middle; }
  const index = low > 0 && x - points.x[low - 1] < points.x[low] - x ? low - 1 : low;
  return { ...run, x: points.x[index], y: points.y[index] };
}

function show(event, plot, rows, x, top, bottom) {
  const cursor = plot.appendChild(document.createElement("i"));
  cursor.className = "cursor";
  Object.assign(cursor.style, { left: `${100 * x}%`, top: `${100 * top}%`, height: `${100 * (bottom - top)}%` });
  tip.replaceChildren(...rows.map((row) => {
    const line = document.createElement("div"), sign = document.createElement("i");
    sign.className = "drawn";
    sign.style.background = row.colour;
    line.append(sign, `${row.name}: ${row.y.toLocaleString("en", { maximumSignificantDigits: 5 })}`);
    const place = document.createElement("small");
    place.textContent = ` at ${row.x.toLocaleString("en", { maximumSignificantDigits: 7 })}`;
    line.append(place);
    return line;
  }));
  document.body.append(tip);
  tip.hidden = false;
  const wide = tip.offsetWidth, room = document.documentElement.clientWidth;
  const beside = event.clientX + 14 + wide > room ? event.clientX - wide - 14 : event.clientX + 14;
  tip.style.left = `${Math.max(4, Math.min(beside, room - wide - 4))}px`;
  tip.style.top = `${Math.max(4, event.clientY - tip.offsetHeight - 10)}px`;
}
