// Charts of Chart.js, in the page's colours, each with a caption and a table of the same values.
import { byId, el, keepOpen } from "./dom.js";

const made = new Map();
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
export const colour = (at) => css(`--c${Math.min(at, 7)}`);

function options(extra) {
  const axis = (more) => ({
    ticks: { color: css("--quiet"), maxRotation: 0, autoSkipPadding: 16 },
    grid: { color: css("--line") },
    title: { display: Boolean(more.title), text: more.title, color: css("--quiet") },
    ...more.axis,
  });
  return {
    animation: false, responsive: true, maintainAspectRatio: false,
    interaction: { mode: "nearest", intersect: false },
    plugins: {
      legend: { display: extra.legend ?? true, position: "bottom", labels: { color: css("--text"), boxWidth: 12 } },
      tooltip: { callbacks: extra.tooltip ?? {} },
    },
    scales: { x: axis(extra.x ?? {}), y: axis(extra.y ?? {}) },
    onClick: extra.onClick,
  };
}

// Draws or changes the chart of a figure; `table` makes the same values as a table.
export function draw(id, caption, type, data, extra, table) {
  const figure = byId(id);
  let chart = made.get(id);
  if (!chart) {
    const canvas = el("canvas", { role: "img" });
    figure.append(el("figcaption"), el("div", { class: extra.tall ? "plot map" : "plot" }, canvas));
    chart = new Chart(canvas, { type, data, options: options(extra) });
    made.set(id, chart);
  } else {
    chart.data = data;
    chart.options = options(extra);
    chart.update("none");
  }
  figure.querySelector("figcaption").textContent = caption;
  chart.canvas.setAttribute("aria-label", `${caption}. The same values are in the table below.`);
  keepOpen(figure, table);
}

export function clear(id) {
  made.get(id)?.destroy();
  made.delete(id);
  byId(id).replaceChildren();
}
