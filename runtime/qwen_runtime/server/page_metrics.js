const SAMPLES = 60;
const SVG = "http://www.w3.org/2000/svg";
const element = (id) => document.getElementById(id);

const TILES = [
  { id: "rate", name: "Generation", unit: "tok/s", digits: 1 },
  { id: "cache", name: "Cache use", unit: "%", digits: 2, top: 100 },
  { id: "running", name: "Running", unit: "", digits: 0 },
  { id: "waiting", name: "Waiting", unit: "", digits: 0 },
  { id: "first", name: "First token", unit: "ms", digits: 1 },
  { id: "inter", name: "Inter-token", unit: "ms", digits: 2 },
];

function authorization() {
  const key = element("api-key").value.trim();
  return key ? { authorization: `Bearer ${key}` } : {};
}

function makeTile({ id, name, unit }) {
  const tile = document.createElement("div");
  tile.className = "tile";
  const term = document.createElement("dt");
  term.textContent = name;
  const value = document.createElement("span");
  value.className = "value";
  value.id = `tile-${id}`;
  value.textContent = "–";
  const suffix = document.createElement("span");
  suffix.className = "unit";
  suffix.textContent = unit;
  const detail = document.createElement("dd");
  detail.append(value, suffix);
  const drawing = document.createElementNS(SVG, "svg");
  drawing.setAttribute("viewBox", "0 0 100 28");
  drawing.setAttribute("preserveAspectRatio", "none");
  drawing.setAttribute("aria-hidden", "true");
  const area = document.createElementNS(SVG, "polygon");
  const line = document.createElementNS(SVG, "polyline");
  drawing.append(area, line);
  detail.append(drawing);
  tile.append(term, detail);
  element("tiles").append(tile);
  return { value, area, line, samples: [] };
}

const tiles = new Map(TILES.map((tile) => [tile.id, { ...tile, ...makeTile(tile) }]));

/** Samples of Prometheus' text by name; those of one name are added up, buckets left out. */
function parseMetrics(text) {
  const values = new Map();
  for (const line of text.split("\n")) {
    const match = /^([a-zA-Z_:][\w:]*)(?:\{.*\})? (\S+)/.exec(line);
    if (match && !match[1].endsWith("_bucket")) {
      values.set(match[1], (values.get(match[1]) ?? 0) + Number(match[2]));
    }
  }
  return values;
}

function show(id, number) {
  const tile = tiles.get(id);
  const known = Number.isFinite(number);
  tile.value.textContent = known ? number.toFixed(tile.digits) : "–";
  tile.samples.push(known ? number : 0);
  tile.samples.splice(0, tile.samples.length - SAMPLES);
  const top = tile.top ?? Math.max(1, ...tile.samples);
  const start = 100 - ((tile.samples.length - 1) * 100) / (SAMPLES - 1);
  const points = tile.samples.map((sample, index) => {
    const x = start + (index * 100) / (SAMPLES - 1);
    return `${x.toFixed(2)},${(27 - (25 * sample) / top).toFixed(2)}`;
  });
  tile.line.setAttribute("points", points.join(" "));
  tile.area.setAttribute("points", [`${start.toFixed(2)},28`, ...points, "100,28"].join(" "));
}

let previous = null;
const means = { first: NaN, inter: NaN };

/** The mean of a histogram's observations since the last scrape; where none came, as before. */
function meanMilliseconds(id, name, values) {
  const since = (suffix) => {
    const now = values.get(`qwen:${name}_${suffix}`) ?? 0;
    return now - (previous?.values.get(`qwen:${name}_${suffix}`) ?? 0);
  };
  const count = since("count");
  if (count > 0) {
    means[id] = (1000 * since("sum")) / count;
  }
  return means[id];
}

function draw(values) {
  const at = performance.now();
  const now = (name) => values.get(`qwen:${name}`);
  const tokens = now("generation_tokens_total");
  const before = previous?.values.get("qwen:generation_tokens_total");
  const rate = before === undefined ? 0 : (1000 * (tokens - before)) / (at - previous.at);
  // A server that was started anew counts from nothing.
  show("rate", Math.max(0, rate));
  element("live-rate").textContent = `${Math.max(0, rate).toFixed(1)} tok/s`;
  show("cache", 100 * now("kv_cache_usage_perc"));
  show("running", now("num_requests_running"));
  show("waiting", now("num_requests_waiting"));
  show("first", meanMilliseconds("first", "time_to_first_token_seconds", values));
  show("inter", meanMilliseconds("inter", "inter_token_latency_seconds", values));
  previous = { at, values };
  const count = (name) => Math.round(now(name) ?? 0).toLocaleString("en");
  element("totals").textContent =
    `Answers: ${count("request_success_total")}. ` +
    `Tokens generated: ${count("generation_tokens_total")}, ` +
    `of prompts: ${count("prompt_tokens_total")} ` +
    `(${count("prefix_cache_hits_total")} from the cache).`;
}

function showHealth(state, text) {
  element("health").dataset.state = state;
  element("health-text").textContent = text;
}

async function scrape() {
  try {
    const response = await fetch("metrics", { headers: authorization(), cache: "no-store" });
    if (response.status === 401) {
      showHealth("ok", "Online");
      element("live-note").textContent = "needs the API key";
      return;
    }
    if (!response.ok) {
      throw new Error(`status ${response.status}`);
    }
    const values = parseMetrics(await response.text());
    const ready = values.has("qwen:num_requests_running");
    showHealth(ready ? "ok" : "waiting", ready ? "Online" : "Loading");
    element("live-note").textContent = "";
    if (ready) {
      draw(values);
    }
  } catch {
    showHealth("bad", "Unreachable");
    element("live-note").textContent = "no connection";
  }
}

async function watch() {
  for (;;) {
    if (document.visibilityState === "visible") {
      await scrape();
    }
    await new Promise((resolve) => setTimeout(resolve, 1000));
  }
}
