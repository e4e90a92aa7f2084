// The status page: says hello with the token, asks `status` once a second, shows what comes back.
// The token comes in the link's fragment or the form; it is kept for this tab and goes nowhere but into `hello`.

const PROTOCOL = 1;
const POLL_MS = 1000;
const MAX_RETRY_MS = 10_000;
const NUM_SAMPLES = 120; // two minutes
const CLOSED_AUTH = 4401;

const at = (id) => document.getElementById(id);
const number = (value, digits = 0) => value.toLocaleString("en", { maximumFractionDigits: digits });
const percent = (share) => `${(100 * share).toFixed(share > 0 && share < 0.1 ? 1 : 0)}%`;

// --- the token

let memory = null; // where a browser lets a page keep nothing

function readToken() {
  const given = new URLSearchParams(location.hash.slice(1)).get("token");
  if (given) {
    keepToken(given);
    history.replaceState(null, "", location.pathname);
  }
  try {
    return sessionStorage.getItem("token") ?? memory;
  } catch {
    return memory;
  }
}

function keepToken(token) {
  memory = token;
  try {
    if (token === null) sessionStorage.removeItem("token");
    else sessionStorage.setItem("token", token);
  } catch {
    // `memory` has it
  }
}

// --- what is shown

function say(text, kind) {
  if (at("state").textContent !== text) at("state").textContent = text; // a screen reader reads every change
  at("state").dataset.kind = kind;
}

function showLock(why) {
  say("locked", "wait");
  at("view").hidden = true;
  at("lock").hidden = false;
  at("refusal").textContent = why;
  at("token").focus();
}

function rows(list, entries) {
  list.replaceChildren(
    ...entries.flatMap(([name, value]) => {
      const [dt, dd] = [document.createElement("dt"), document.createElement("dd")];
      [dt.textContent, dd.textContent] = [name, value];
      return [dt, dd];
    }),
  );
}

function showDaemon(welcome) {
  at("version").textContent = welcome.version;
  at("lock").hidden = true;
  at("view").hidden = false;
  at("view").classList.remove("is-stale");
  const base = welcome.base;
  rows(at("facts"), [
    ["Device", welcome.device],
    ["Computes with", welcome.backend],
    ["Base", `${base.name}, context of ${number(base.context)} tokens`],
    ["SHA-256", base.sha256],
    ["Can do", welcome.caps.join(", ")],
  ]);
}

const personas = new Map();
let resident = new Set();

function showPersonas() {
  const sorted = [...personas.values()].sort((a, b) => (a.id < b.id ? -1 : 1));
  const mute = sorted.filter((persona) => persona.error);
  const stale = sorted.filter((persona) => persona.stale && !persona.error);
  const sound = sorted.filter((persona) => !persona.error && !persona.stale);
  const num = sorted.length - mute.length;
  at("personas-title").textContent = `Personas: ${num}` + (mute.length ? `, and ${mute.length} that cannot speak` : "");
  at("problems").replaceChildren(...[...mute, ...stale].map(personaCard));
  at("personas").replaceChildren(...sound.map(personaCard));
}

function personaCard(persona) {
  const card = at("persona").content.firstElementChild.cloneNode(true);
  const put = (selector, text) => { card.querySelector(selector).textContent = text ?? ""; };
  const problem = persona.error ?? persona.stale;
  card.classList.toggle("cannot", Boolean(persona.error));
  card.classList.toggle("stale", Boolean(persona.stale && !persona.error));
  put("h3", persona.display_name);
  put(".id", persona.id === persona.display_name.toLowerCase() ? "" : persona.id);
  put(".voice", voiceOf(persona));
  put(".why", problem?.message);
  put(".hint", problem?.hint);
  return card;
}

function voiceOf(persona) {
  if (persona.error) return "Cannot speak";
  if (persona.stale) return "Its newest files are not in use";
  if (!persona.adapter) return "Prompt only";
  return resident.has(persona.adapter) ? "Adapter loaded" : "Adapter not loaded yet";
}

function showFigures(status) {
  at("tokens_per_s").textContent = number(status.tokens_per_s);
  const limit = status.max_tokens_per_s ? `; a client allows ${number(status.max_tokens_per_s)} a second` : "";
  at("totals").textContent = `${number(status.tokens)} tokens in ${number(status.forwards)} forward passes${limit}`;
  for (const name of ["active", "queued", "connections"]) at(name).textContent = number(status[name]);
  at("adapters").textContent = number(status.adapters.length);
  at("kv").textContent = percent(status.kv_used);
  at("kv-note").textContent = `and ${percent(status.kv_cached)} kept prompts`;
  at("kv_used").setAttribute("width", percent(status.kv_used));
  at("kv_cached").setAttribute("width", percent(Math.min(1, status.kv_used + status.kv_cached)));
  const memory = Object.entries(status.memory ?? {}).filter(([, mib]) => Number.isFinite(mib));
  at("memory-card").hidden = memory.length === 0;
  rows(at("memory"), memory.map(([name, mib]) => [name.replaceAll("_", " "), `${number(mib)} MiB`]));
  if (status.paused) say("paused by a client", "wait");
  else say(status.active ? "speaking" : "ready", "good");
  if (status.adapters.length !== resident.size || status.adapters.some((name) => !resident.has(name))) {
    resident = new Set(status.adapters);
    showPersonas();
  }
}

// --- the chart

const samples = []; // of tokens_per_s, a second apart, the newest last
let pointedAt = null; // an index into them

function addSample(value) {
  samples.push(value);
  if (samples.length > NUM_SAMPLES) samples.shift();
  drawChart();
}

function drawChart() {
  const most = niceCeiling(Math.max(10, ...samples));
  const x = (index) => (600 * (index + NUM_SAMPLES - samples.length)) / (NUM_SAMPLES - 1);
  const points = samples.map((value, index) => `${x(index).toFixed(1)} ${(119 - (118 * value) / most).toFixed(1)}`);
  at("curve").setAttribute("d", points.length > 1 ? `M${points.join("L")}` : "");
  at("area").setAttribute("d", points.length > 1 ? `M${x(0).toFixed(1)} 119L${points.join("L")}L600 119Z` : "");
  at("scale").textContent = number(most);
  const isPointed = pointedAt !== null && samples[pointedAt] !== undefined;
  at("cursor").setAttribute("d", isPointed ? `M${x(pointedAt).toFixed(1)} 0V120` : "");
  at("readout").textContent = isPointed
    ? `${number(samples[pointedAt])} tokens/s, ${samples.length - 1 - pointedAt} s ago`
    : "";
}

function niceCeiling(value) {
  const unit = 10 ** Math.floor(Math.log10(value));
  return unit * [1, 1.5, 2, 3, 4, 5, 6, 8, 10].find((step) => step * unit >= value);
}

at("chart").addEventListener("pointermove", (event) => {
  const box = at("chart").getBoundingClientRect();
  const place = Math.round(((event.clientX - box.left) / box.width) * (NUM_SAMPLES - 1));
  pointedAt = place - (NUM_SAMPLES - samples.length);
  drawChart();
});
at("chart").addEventListener("pointerleave", () => {
  pointedAt = null;
  drawChart();
});

// --- the connection

let socket = null;
let pollTimer = 0;
let retryTimer = 0;
let retryMs = 500;

async function begin() {
  if (token === null && (await needsToken())) showLock("");
  else connect();
}

async function needsToken() {
  try {
    return (await (await fetch("/healthz")).json()).needs_token;
  } catch {
    return false; // nobody answers: connecting says so, and tries again
  }
}

function connect() {
  clearTimeout(retryTimer);
  clearTimeout(pollTimer);
  say("connecting", "wait");
  const scheme = location.protocol === "https:" ? "wss" : "ws";
  const mine = new WebSocket(`${scheme}://${location.host}/v1`, ["npc.v1.json"]);
  const parts = new Map(); // replies that came in pieces
  socket = mine;
  mine.onopen = () => {
    const hello = { type: "hello", protocol: PROTOCOL, client: { name: "status page" } };
    send(token === null ? hello : { ...hello, token });
  };
  mine.onmessage = (event) => {
    const message = JSON.parse(event.data);
    if (message.type === "welcome") onWelcome(message);
    else if (message.type === "reply") onReply(message, parts);
    else if (message.type === "event") onEvent(message);
  };
  mine.onclose = (event) => {
    if (mine === socket) onClose(event.code, event.reason);
  };
}

function send(message) {
  if (socket?.readyState === WebSocket.OPEN) socket.send(JSON.stringify(message));
}

function onWelcome(welcome) {
  retryMs = 500;
  personas.clear();
  showDaemon(welcome);
  send({ type: "persona.list", id: "personas" });
  send({ type: "status", id: "status" });
}

function onReply(message, parts) {
  let body = message.body;
  if (message.parts) {
    const pieces = [...(parts.get(message.re) ?? []), message.data];
    parts.set(message.re, pieces);
    if (pieces.length < message.parts) return;
    parts.delete(message.re);
    body = JSON.parse(pieces.join(""));
  }
  if (message.re === "status") onStatus(body);
  else if (message.re === "personas") {
    for (const persona of body.personas) personas.set(persona.id, persona);
    showPersonas();
  }
}

function onStatus(status) {
  showFigures(status);
  addSample(status.tokens_per_s);
  pollTimer = setTimeout(() => send({ type: "status", id: "status" }), POLL_MS);
}

function onEvent(event) {
  if (event.kind === "model.loading") say(`${event.message} ${percent(event.progress)}`, "wait");
  if (event.kind !== "persona.changed") return;
  const persona = event.persona;
  if (persona.error?.code === "persona_unknown") personas.delete(persona.id);
  else personas.set(persona.id, persona);
  showPersonas();
}

function onClose(code, reason) {
  clearTimeout(pollTimer);
  if (code === CLOSED_AUTH) {
    showLock(token === null ? "" : "That token is not this daemon's. A daemon that was started anew has a new one.");
    token = null;
    keepToken(null);
    return;
  }
  at("view").classList.add("is-stale");
  retryMs = Math.min(MAX_RETRY_MS, 2 * retryMs);
  say(`${reason || "no answer"}; trying again`, "bad");
  retryTimer = setTimeout(connect, retryMs * (0.75 + Math.random() / 2));
}

at("lock").addEventListener("submit", (event) => {
  event.preventDefault();
  const given = at("token").value.trim();
  token = given.includes("#token=") ? decodeURIComponent(given.split("#token=")[1]) : given;
  at("token").value = "";
  keepToken(token);
  connect();
});

addEventListener("hashchange", () => {
  token = readToken();
  socket?.close();
  begin();
});

let token = readToken();
begin();
