// Charts of Chart.js, in the page's colours, each with a caption and a table of the same values.
import { byId, el, keepOpen } from "./dom.js";

const made = new Map();
// Charts out of view are drawn when they come into view: a browser beside the service takes its cores.
const out = new Map();
const sight = new IntersectionObserver((seen) => {
  for (const { target, isIntersecting } of seen) {
    const waiting = out.get(target.id);
    if (!isIntersecting) out.set(target.id, waiting ?? null);
    else {
      out.delete(target.id);
      waiting?.();
    }
  }
}, { rootMargin: "50%" });
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
    sight.observe(figure);
  } else {
    const change = () => {
      chart.data = data;
      chart.options = options(extra);
      chart.update("none");
    };
    if (out.has(id)) out.set(id, change);
    else change();
  }
  figure.querySelector("figcaption").textContent = caption;
  chart.canvas.setAttribute("aria-label", `${caption}. The same values are in the table below.`);
  keepOpen(figure, table);
}

export function clear(id) {
  made.get(id)?.destroy();
  made.delete(id);
  out.delete(id);
  sight.unobserve(byId(id));
  byId(id).replaceChildren();
}
