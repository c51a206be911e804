// The page: asks for JSON every few seconds while it is visible, and shows it.
import { bytes, byId, count, date, el, fixed, ms, percent, put, table, time } from "./dom.js";
import { clear, colour, draw } from "./charts.js";

const EVERY_MS = 5000;
const WATCH_MS = 2000;
const ROWS_PER_PAGE = 50;
const SOURCE_COLOURS = 7;
const state = { overview: null, rates: [], memory: null, layer: 0, paused: false, watching: false, map: null, page: 0 };

async function ask(path, parameters = {}) {
  const query = new URLSearchParams(parameters).toString();
  const reply = await fetch(`/api/${path}${query && "?"}${query}`).catch(() => {
    throw new Error("the service has ended, or cannot be reached");
  });
  const document = await reply.json();
  if (!reply.ok) throw new Error(document.error);
  return document;
}

function problem(error) {
  byId("problem").hidden = !error;
  byId("problem").textContent = error ? `Not up to date: ${error.message}` : "";
}

const here = () => ({ memory: state.memory, layer: state.layer });
const chosenStats = () => state.overview.stats.memories.find((each) => each.memory === state.memory);
const chosenMemory = () => state.overview.memories.find((each) => each.name === state.memory);
const sum = (rows, name) => rows.reduce((total, row) => total + row[name], 0);

async function refresh() {
  try {
    state.overview = await ask("overview");
    choose();
    state.rates = state.memory === null ? [] : (await ask("history", { memory: state.memory })).rates;
    show();
    problem(null);
    const [gone] = wanted();
    byId("gone").hidden = gone === null || gone === state.memory;
    byId("gone").textContent = `No memory ${gone} here${state.memory === null ? "" : `: this is ${state.memory}`}.`;
    byId("updated").textContent = `updated ${time(state.overview.at_unix_ms)}`;
  } catch (error) {
    problem(error);
  }
}

function choose() {
  const names = state.overview.memories.map((each) => each.name);
  const [memory, layer] = wanted();
  const before = [state.memory, state.layer];
  state.memory = names.includes(memory) ? memory : names[0] ?? null;
  const layers = chosenMemory()?.layers ?? [];
  state.layer = layers.some((each) => each.layer === layer) ? layer : 0;
  fill("memory", names.map((name) => [name, name]), state.memory);
  fill("layer", layers.map((each) => [each.layer, `${each.layer}`]), state.layer);
  if (before[0] !== state.memory || before[1] !== state.layer) changed();
}

function fill(id, items, chosen) {
  const select = byId(id);
  const key = JSON.stringify(items);
  if (select.dataset.items !== key) {
    put(select, ...items.map(([value, text]) => el("option", { value }, text)));
    select.dataset.items = key;
  }
  select.value = chosen ?? "";
}

function wanted() {
  const hash = new URLSearchParams(location.hash.slice(1));
  return [hash.get("memory"), Number(hash.get("layer") ?? 0)];
}

function want(memory, layer) {
  history.replaceState(null, "", `#${new URLSearchParams({ memory, layer })}`);
  refresh();
}

// Another memory or layer: what was loaded on demand was of the one before.
function changed() {
  for (const id of ["map", "sources"]) clear(id);
  state.map = null;
  for (const id of ["map-note", "sources-note", "recent-note"]) byId(id).textContent = "";
  for (const id of ["explained", "recent"]) put(id);
}

function show() {
  showService();
  showMemories();
  showOperations();
  if (state.memory === null || !chosenStats()) return;
  showTotals();
  showRates();
  showStages();
  showLayers();
  showLambda();
  if (state.map && isNew("map", [state.map.version, chosenMemory().version])) showMap();
}

const fact = ([name, value]) => el("div", {}, el("dt", {}, name), el("dd", { "data-name": name }, value));

function showService() {
  const { stats, target } = state.overview;
  const refused = Object.entries(stats.refused_lookups);
  put("service", ...[
    ["service", `${stats.service_version} at ${target}`],
    ["up", `${count(stats.uptime_s)} s`],
    ["resident", bytes(stats.resident_bytes)],
    ["calls in flight", count(stats.in_flight)],
    ["refused lookups", refused.length ? refused.map(([why, n]) => `${count(n)} ${why}`).join(", ") : "none"],
  ].map(fact));
}

function showTotals() {
  const { layers } = chosenStats();
  const tokens = sum(layers, "tokens"), abstained = sum(layers, "tokens_abstained");
  const lambda = layers.reduce((total, each) => total + each.mean_lambda * each.tokens, 0);
  put("totals", ...[
    ["entries", count(sum(layers, "entries"))],
    ["lookups", count(sum(layers, "route_requests"))],
    ["tokens", count(tokens)],
    ["answered", percent(tokens ? (tokens - abstained) / tokens : null)],
    ["abstained: empty", count(sum(layers, "abstained_empty"))],
    ["abstained: too far", count(sum(layers, "abstained_too_far"))],
    ["abstained: layer off", count(sum(layers, "abstained_layer_off"))],
    ["mean lambda", tokens ? fixed(lambda / tokens) : "–"],
    ["hits", count(sum(layers, "hits"))],
    ["never hit", count(sum(layers, "entries_never_hit"))],
  ].map(fact));
  const replicas = state.overview.stats.replicas.filter((each) => each.memory === state.memory);
  const found = sum(layers, "replica_tokens");
  byId("replicas").textContent = replicas.length || found
    ? `${count(found)} of the tokens were looked up in replicas beside models, which report sums: their time, their ` +
      `reasons and the distribution of their lambda are counted there (${count(sum(layers, "replica_abstained"))} of them abstained).`
    : "No replica: every lookup is answered here.";
  put("replica-table", ...(replicas.length ? [table("Replicas that are kept in step now", [
    { title: "version", number: true, of: (each) => each.version || "being made" },
    { title: "of", number: true, of: (each) => each.memory_version },
    { title: "connected s", number: true, of: (each) => count(each.connected_s) },
  ], replicas)] : []));
}

function showRates() {
  const rates = state.rates;
  const labels = rates.map((each) => time(each.at_unix_ms));
  const line = (label, at, values, axis) => ({
    label, data: values, borderColor: colour(at), backgroundColor: colour(at), pointRadius: rates.length < 30 ? 2 : 0,
    borderWidth: 2, borderDash: at % 2 ? [6, 3] : [], spanGaps: false, yAxisID: axis ?? "y",
  });
  const of = (name, factor = 1) => rates.map((each) => (each[name] === null ? null : factor * each[name]));
  const whole = () => table("Rates between samples", [
    { title: "until", of: (each) => time(each.at_unix_ms) },
    { title: "tokens/s", number: true, of: (each) => fixed(each.tokens_per_s, 1) },
    { title: "answered", number: true, of: (each) => percent(each.answered) },
    { title: "abstained", number: true, of: (each) => percent(each.abstained) },
    { title: "hits/s", number: true, of: (each) => fixed(each.hits_per_s, 1) },
    { title: "refused/s", number: true, of: (each) => fixed(each.refused_per_s, 2) },
    { title: "p50 ms", number: true, of: (each) => ms(each.p50_ms) },
    { title: "p99 ms", number: true, of: (each) => ms(each.p99_ms) },
  ], [...rates].reverse());
  draw("rates", "Share of the tokens that were answered, and that abstained, in %", "line",
    { labels, datasets: [line("answered", 0, of("answered", 100)), line("abstained", 1, of("abstained", 100))] },
    { y: { axis: { min: 0, max: 100 } } }, whole);
  draw("traffic", "Tokens per second, and refused lookups per second (in all memories): fallbacks of clients", "line",
    { labels, datasets: [line("tokens/s", 0, of("tokens_per_s")), line("refused/s", 1, of("refused_per_s"))] },
    { y: { axis: { min: 0 } } }, whole);
  draw("latency", "Whole lookups over time, in ms", "line",
    { labels, datasets: [line("p50", 0, of("p50_ms")), line("p99", 1, of("p99_ms"))] }, { y: { axis: { min: 0 } } }, whole);
}

function showStages() {
  put("stages", table("Since the service started, all layers", [
    { title: "stage", of: (each) => each.stage },
    { title: "lookups", number: true, of: (each) => count(each.lookups) },
    { title: "mean ms", number: true, of: (each) => fixed(each.mean_ms) },
    { title: "p50 ms", number: true, of: (each) => ms(each.p50_ms) },
    { title: "p99 ms", number: true, of: (each) => ms(each.p99_ms) },
  ], state.overview.stages[state.memory]));
}

function showLayers() {
  const described = new Map(chosenMemory().layers.map((each) => [each.layer, each]));
  const columns = ["entries", "route_requests", "tokens", "tokens_abstained", "hits", "entries_never_hit"];
  put("layers", table("Since the service started; names as in router-admin stats", [
    { title: "layer", of: (each) => each.layer },
    ...columns.map((name) => ({ title: name.replaceAll("_", " "), number: true, of: (each) => count(each[name]) })),
    { title: "mean lambda", number: true, of: (each) => fixed(each.mean_lambda) },
    { title: "mean search ms", number: true, of: (each) => fixed(each.mean_search_ms) },
    { title: "indexed", number: true, of: (each) => count(described.get(each.layer)?.indexed_entries ?? 0) },
    { title: "search keys", of: (each) => described.get(each.layer)?.quantization ?? "" },
    { title: "disk", number: true, of: (each) => bytes(each.disk_bytes_unknown ? null : each.disk_bytes) },
  ], chosenStats().layers, { chosen: (each) => each.layer === state.layer }));
}

function showLambda() {
  const layer = chosenStats().layers.find((each) => each.layer === state.layer);
  const counts = layer.lambda_counts;
  const range = (at) => `${(at / counts.length).toFixed(2)}–${((at + 1) / counts.length).toFixed(2)}`;
  const caption = `Tokens of layer ${state.layer} that this service answered, by lambda; mean ${fixed(layer.mean_lambda)} over all tokens`;
  draw("lambda", caption, "bar",
    { labels: counts.map((_, at) => range(at)), datasets: [{ label: "tokens", data: counts, backgroundColor: colour(0), categoryPercentage: 1, barPercentage: 0.95 }] },
    { legend: false, x: { title: "lambda" }, y: { title: "tokens", axis: { beginAtZero: true } } },
    () => table(caption, [
      { title: "lambda", of: ([at]) => range(at) },
      { title: "tokens", number: true, of: ([, n]) => count(n) },
    ], counts.map((n, at) => [at, n])));
}

async function onDemand(button, note, work) {
  const { memory, layer } = here();
  byId(button).disabled = true;
  byId(note).textContent = "…";
  try {
    await work(() => memory === state.memory && layer === state.layer);
  } catch (error) {
    byId(note).textContent = error.message;
  } finally {
    byId(button).disabled = false;
  }
}

const sourceName = (name) => name || "(no source)";

function loadSources() {
  return onDemand("load-sources", "sources-note", async (current) => {
    const found = await ask("sources", { memory: state.memory });
    if (!current()) return;
    const first = found.sources.slice(0, 15);
    const caption = `Entries by source, all layers${found.sources.length > first.length ? `, the ${first.length} largest` : ""}`;
    byId("sources-note").textContent = `${count(found.sources.length)} ${found.sources.length === 1 ? "source" : "sources"} at version ${found.version}` +
      (found.unlisted_entries ? `; ${count(found.unlisted_entries)} entries are of others` : "");
    draw("sources", caption, "bar",
      { labels: first.map((each) => shorten(sourceName(each.source))), datasets: [{ label: "entries", data: first.map((each) => each.entries), backgroundColor: colour(0), maxBarThickness: 70 }] },
      { legend: false, y: { title: "entries", axis: { beginAtZero: true } } },
      () => table("Sources", [
        { title: "source", words: true, of: (each) => sourceName(each.source) },
        { title: "entries", number: true, of: (each) => count(each.entries) },
        { title: "examples", number: true, of: (each) => count(each.examples) },
        { title: "first written", of: (each) => date(each.first_unix_ms) },
        { title: "last written", of: (each) => date(each.last_unix_ms) },
        { title: "hits", number: true, of: (each) => count(each.hits) },
      ], found.sources.slice(0, 500)));
  });
}

const shorten = (text, most = 28) => (text.length > most ? `${text.slice(0, most - 1)}…` : text);

function loadMap() {
  return onDemand("load-map", "map-note", async (current) => {
    const found = await ask("map", here());
    if (!current()) return;
    state.map = found;
    state.page = 0;
    isNew("map", [found.version, chosenMemory().version]);
    showMap();
  });
}

function showMap() {
  const { points, version, variance_share: share } = state.map;
  const now = chosenMemory().version;
  byId("map-note").textContent = `${count(points.length)} entries at version ${version}` +
    (now === version ? "" : `; the memory is at ${now} now`);
  const sizes = new Map();
  for (const point of points) sizes.set(point.provenance.source, (sizes.get(point.provenance.source) ?? 0) + 1);
  const names = [...sizes].sort((a, b) => b[1] - a[1]).map(([name]) => name);
  const groups = names.slice(0, SOURCE_COLOURS).map((name, at) => [sourceName(name), points.filter((p) => p.provenance.source === name), at]);
  const rest = new Set(names.slice(SOURCE_COLOURS));
  if (rest.size) groups.push([`${rest.size} other sources`, points.filter((p) => rest.has(p.provenance.source)), SOURCE_COLOURS]);
  const styles = ["circle", "triangle", "rect", "rectRot", "cross", "star", "crossRot", "circle"];
  const caption = `Keys of layer ${state.layer}: the first two principal components, which have ${percent(share)} of the sample's variance`;
  draw("map", caption, "scatter", {
    datasets: groups.map(([name, data, at]) => ({
      label: shorten(name), data, backgroundColor: colour(at), borderColor: colour(at), pointStyle: styles[at], pointRadius: 3, pointHoverRadius: 7,
    })),
  }, {
    tall: true,
    tooltip: { label: (item) => `${shorten(sourceName(item.raw.provenance.source))}, ${shorten(item.raw.provenance.example)}, token ${item.raw.provenance.position}` },
    onClick: (_, items, chart) => {
      if (items.length) explain(chart.data.datasets[items[0].datasetIndex].data[items[0].index].id);
    },
  }, mapTable);
}

function mapTable() {
  const { points } = state.map;
  const pages = Math.max(1, Math.ceil(points.length / ROWS_PER_PAGE));
  const rows = points.slice(state.page * ROWS_PER_PAGE, (state.page + 1) * ROWS_PER_PAGE);
  const turn = (by) => () => {
    state.page = (state.page + by + pages) % pages;
    const details = byId("map").querySelector("details");
    details.refill();
    details.querySelector(by < 0 ? "button" : "button + button").focus();
  };
  return el("div", {},
    el("p", { class: "controls" },
      el("button", { type: "button", onclick: turn(-1) }, "Previous"), el("button", { type: "button", onclick: turn(1) }, "Next"),
      `page ${state.page + 1} of ${pages}`),
    table("Entries of the map", [
      { title: "entry", of: (point) => explainButton(point.id) },
      ...originColumns((point) => point.provenance, rows),
      { title: "x", number: true, of: (point) => fixed(point.x) },
      { title: "y", number: true, of: (point) => fixed(point.y) },
    ], rows));
}

const explainButton = (id) => el("button", { type: "button", class: "link", onclick: () => explain(id) }, id);

function originColumns(of, rows) {
  const part = (name, how = String) => (row) => (of(row) ? how(of(row)[name]) : "gone");
  return [
    ...(rows.some((row) => of(row)?.snippet) ? [{ title: "words", words: true, of: (row) => (of(row)?.snippet ? snippet(of(row)) : "–") }] : []),
    { title: "source", words: true, of: part("source", sourceName) },
    { title: "example", words: true, of: part("example") },
    { title: "position", number: true, of: part("position") },
    { title: "token", number: true, of: part("token", (token) => (token < 0 ? "–" : token)) },
  ];
}

// The token among the words around it; its place is counted in characters, not in units of UTF-16.
function snippet({ snippet: text, token_start: start, token_end: end }) {
  const characters = [...text];
  const part = (from, to) => characters.slice(from, to).join("");
  return el("q", {}, part(0, start), el("mark", {}, part(start, end)), part(end));
}

const experts = (each) => each.experts.map((expert, at) => `${expert}: ${fixed(each.weights[at], 2)}`).join(", ");

function casesTable(caption, token, read) {
  const rows = token.cases.map((each, at) => ({ ...each, at }));
  return table(caption, [
    { title: "entry", of: (each) => explainButton(each.id) },
    { title: "distance²", number: true, of: (each) => fixed(each.squared_distance) },
    { title: "similarity", number: true, of: (each) => fixed(each.similarity) },
    ...originColumns((each) => each.provenance, rows),
    { title: "experts: weight", words: true, of: experts },
  ], rows, { unread: (each) => each.at >= read });
}

const outcome = (token) => (token.abstained === "unspecified" ? `lambda ${fixed(token.lambda)}` : `abstained: ${token.abstained.replaceAll("_", " ")}`);

async function explain(id) {
  byId("entry").value = id;
  try {
    const found = await ask("explain", { ...here(), id });
    const origin = found.provenance;
    const what = [`Entry ${id} of layer ${state.layer}: ${sourceName(origin.source)}, example ${origin.example}, position ${origin.position}` +
      (origin.token < 0 ? "" : `, token ${origin.token}`), ...(origin.snippet ? [": ", snippet(origin)] : [])];
    put("explained",
      el("p", {}, ...what, "."),
      el("p", {}, el("strong", {}, `A token with this key: ${outcome(found.token)}.`),
        ` Its own example is left out. A lookup reads the first ${found.neighbours}; the others are shown paler.`),
      casesTable("The nearest entries of other examples", found.token, found.neighbours));
  } catch (error) {
    put("explained", el("p", { role: "alert" }, error.message));
  }
  byId("explained").focus();
  byId("explained").scrollIntoView({ block: "nearest" });
}

async function watch() {
  if (!state.watching || state.paused || document.hidden || state.memory === null) return;
  try {
    const asked = here();
    const { tokens } = await ask("recent", asked);
    if (asked.memory !== state.memory || asked.layer !== state.layer) return;
    byId("recent-note").textContent = tokens.length ? "" : "None yet. Lookups in replicas are not seen here: model-runner generate --retrieval remote looks up here.";
    if (!byId("recent").contains(document.activeElement) || !tokens.length) {
      put("recent", ...(tokens.length ? [table(`The last token of each of the last lookups in layer ${state.layer}`, [
        { title: "at", of: (each) => time(each.at_unix_ms) },
        { title: "tokens", number: true, of: (each) => count(each.tokens) },
        { title: "outcome", of: outcome },
        { title: "nearest", of: (each) => (each.cases.length ? explainButton(each.cases[0].id) : "–") },
        { title: "similarity", number: true, of: (each) => (each.cases.length ? fixed(each.cases[0].similarity) : "–") },
        ...originColumns((each) => each.cases[0]?.provenance, tokens),
        { title: "experts: weight", words: true, of: (each) => (each.cases.length ? experts(each.cases[0]) : "–") },
      ], tokens)] : []));
    }
  } catch (error) {
    byId("recent-note").textContent = error.message;
  }
}

// What has not changed since the last time stays as it is.
const before = {};
function isNew(name, rows) {
  const now = JSON.stringify(rows);
  const changed = before[name] !== now;
  before[name] = now;
  return changed;
}

function showMemories() {
  if (!isNew("memories", [state.overview.memories, state.memory])) return;
  put("memories", state.overview.memories.length ? table("Memories of this service", [
    { title: "name", words: true, of: (each) => el("button", { type: "button", class: "link", onclick: () => want(each.name, 0) }, each.name) },
    { title: "kind", of: (each) => each.settings.kind.replaceAll("_", " ") },
    { title: "model", words: true, of: (each) => each.fingerprint.architecture },
    { title: "layers", number: true, of: (each) => each.layers.length },
    { title: "entries", number: true, of: (each) => count(sum(each.layers, "entries")) },
    { title: "K", number: true, of: (each) => each.settings.neighbours },
    { title: "version", number: true, of: (each) => each.version },
    { title: "made", of: (each) => date(each.created_unix_ms) },
  ], state.overview.memories, { chosen: (each) => each.name === state.memory }) : el("p", {}, "None yet: model-runner build makes one."));
}

function showOperations() {
  const rows = [...state.overview.operations].reverse().slice(0, 30);
  if (!isNew("operations", rows)) return;
  const far = (each) => (each.state === "running"
    ? el("progress", { max: each.total || 1, value: each.total ? each.done : undefined, "aria-label": `${each.kind} of ${each.memory}` })
    : each.state + (each.error ? `: ${each.error}` : ""));
  put("operations", rows.length ? table("Those that run, and the last that ended", [
    { title: "kind", of: (each) => each.kind },
    { title: "memory", words: true, of: (each) => each.memory },
    { title: "state", words: true, of: far },
    { title: "stage", words: true, of: (each) => each.stage },
    { title: "done", number: true, of: (each) => (each.total ? `${count(each.done)} of ${count(each.total)}` : count(each.done)) },
    { title: "started", of: (each) => date(each.started_unix_ms) },
    { title: "took s", number: true, of: (each) => (each.ended_unix_ms ? fixed((each.ended_unix_ms - each.started_unix_ms) / 1000, 1) : "–") },
  ], rows) : el("p", {}, "None since the service started."));
}

async function showSnapshots() {
  try {
    const { snapshots, remark } = await ask("snapshots");
    put("snapshots", snapshots.length ? table("Snapshots of this service", [
      { title: "memory", words: true, of: (each) => each.memory },
      { title: "name", words: true, of: (each) => each.name },
      { title: "made", of: (each) => date(each.created_unix_ms) },
      { title: "entries", number: true, of: (each) => count(each.entries) },
      { title: "size", number: true, of: (each) => bytes(each.content_bytes) },
      { title: "problem", words: true, of: (each) => each.problem || "none" },
    ], snapshots) : el("p", {}, remark || "None: router-admin snapshot create makes one."));
  } catch (error) {
    put("snapshots", el("p", {}, error.message));
  }
}

function press(id, name) {
  byId(id).addEventListener("click", () => {
    state[name] = !state[name];
    byId(id).setAttribute("aria-pressed", state[name]);
    if (name === "watching") { put("recent"); watch(); }
  });
}

async function loop() {
  if (!state.paused && !document.hidden) await refresh();
  setTimeout(loop, EVERY_MS);
}

byId("memory").addEventListener("change", (event) => want(event.target.value, 0));
byId("layer").addEventListener("change", (event) => want(state.memory, event.target.value));
byId("load-sources").addEventListener("click", loadSources);
byId("load-map").addEventListener("click", loadMap);
byId("explain-form").addEventListener("submit", (event) => { event.preventDefault(); explain(byId("entry").value); });
press("pause", "paused");
press("watch", "watching");
addEventListener("hashchange", refresh);
document.addEventListener("visibilitychange", () => { if (!document.hidden && !state.paused) refresh(); });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  if (state.overview) show();
  if (state.map) showMap();
});
setInterval(watch, WATCH_MS);
setInterval(() => { if (!state.paused && !document.hidden) showSnapshots(); }, 60000);
showSnapshots();
loop();
