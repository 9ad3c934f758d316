"use strict";
// The browser's side of worldmodel/play/messages.py. No library, no build step.

const HEADER_BYTES = 40; // FRAME_HEADER there: <BBHHHIiIIffff
const REAL = 1, PAUSED = 2, DRIFT = 4, LEVEL_ENDED = 8, RECORDING = 16;
const STRIP_FRAMES = 320;
const ARROWS = { ArrowLeft: "left", ArrowRight: "right", ArrowUp: "up", ArrowDown: "down" };
const RECONNECT_MS = [250, 500, 1000, 2000, 4000];

const at = (id) => document.getElementById(id);
const kept = { session: sessionStorage.getItem("session") || "" };
let socket = null, welcome = null, tries = 0, messageNumber = 0;
const NOTICE_MS = 8000;
let paused = false, recording = false, held = null, policy = "", byPointer = false, noticeTimer = 0;
const pressed = new Set(), arrivals = [], latencies = [], entropies = [], sentAt = new Map();

function send(message) {
  if (socket && socket.readyState === WebSocket.OPEN) socket.send(JSON.stringify(message));
}

function connect() {
  const scheme = location.protocol === "https:" ? "wss" : "ws";
  socket = new WebSocket(`${scheme}://${location.host}/play`);
  socket.binaryType = "arraybuffer";
  socket.onopen = () => send({ type: "hello", session: kept.session });
  socket.onmessage = (event) => (typeof event.data === "string" ? hear(JSON.parse(event.data)) : see(event.data));
  socket.onclose = (event) => {
    if (event.code === 4001 || event.code === 1008) {
      status(`disconnected: ${event.reason || "refused"}. Reload to play here.`);
      return;
    }
    const wait = RECONNECT_MS[Math.min(tries++, RECONNECT_MS.length - 1)];
    status(`${event.reason ? event.reason + "; " : "connection lost; "}trying again…`);
    setTimeout(connect, wait);
  };
}

function status(text) { if (at("connection").textContent !== text) at("connection").textContent = text; }
function notice(text) {
  at("notice").textContent = text;
  clearTimeout(noticeTimer);
  if (text) noticeTimer = setTimeout(() => notice(""), NOTICE_MS);
}

function hear(message) {
  if (message.type === "welcome") {
    welcome = message;
    kept.session = message.session;
    sessionStorage.setItem("session", message.session);
    tries = 0;
    held = null; // a new connection holds nothing yet
    sentAt.clear();
    status("connected");
    at("world").textContent = `${message.world}; ${message.latent ? "latent" : "recorded"} actions`;
    fill(at("clip"), message.clips.map((name, index) => [index, name]));
    fill(at("pilot"), message.pilots.map((name) => [name, name]));
    at("decode").max = message.tokens;
    at("fps").max = message.max_fps;
    buildActions();
    show(message);
  } else if (message.type === "state") {
    show(message);
  } else if (message.type === "players") {
    at("players").textContent = `${message.now} of ${message.most}`;
  } else if (message.type === "notice") {
    notice(message.text);
  } else if (message.type === "recording") {
    const link = document.createElement("a");
    link.href = message.url;
    link.download = "dream" + message.url.slice(message.url.lastIndexOf("."));
    link.textContent = `Download the recording (${message.frames} frames, ${Math.ceil(message.bytes / 1000)} kB)`;
    at("download").replaceChildren(link);
    if (message.why) notice(message.why);
  } else if (message.type === "error") {
    notice(`The server ended this connection: ${message.text}`);
  }
}

function fill(select, options) {
  select.replaceChildren(...options.map(([value, text]) => new Option(text, value)));
}

function show(message) {
  at("clip").value = message.clip;
  at("pilot").value = message.pilot;
  if (message.pilot !== "human") policy = message.pilot;
  for (const [id, name] of [["temperature", "temperature"], ["decode", "decode_steps"], ["fps", "fps"]])
    if (document.activeElement !== at(id)) at(id).value = message[name];
  at("real-off").hidden = !message.real_off;
  at("real-off").textContent = message.real_off ? `The real game is off: ${message.real_off}` : "";
  at("resync").disabled = Boolean(message.real_off);
}

function buildActions() {
  const names = welcome.actions;
  at("actions").replaceChildren(...names.map((name, index) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = index < 10 ? `${index}: ${name}` : name;
    button.dataset.action = index;
    button.setAttribute("aria-pressed", "false");
    const down = (event) => { if (!event.key || event.key === "Enter" || event.key === " ") { if (event.key) event.preventDefault(); press("button" + index); } };
    const up = () => release("button" + index);
    button.addEventListener("pointerdown", down);
    button.addEventListener("keydown", down);
    for (const kind of ["pointerup", "pointerleave", "pointercancel", "keyup", "blur"]) button.addEventListener(kind, up);
    return button;
  }));
}

// What is held down decides the action: a button or digit by its number, arrows by the name of the game's action.
function wanted() {
  for (const name of pressed) if (name.startsWith("button")) return { type: "act", action: Number(name.slice(6)) };
  const game = welcome.game_actions;
  if (!game.length) return { type: "act", action: 0 };
  const x = pressed.has("left") ? "left" : pressed.has("right") ? "right" : "";
  const y = pressed.has("up") ? "up" : pressed.has("down") ? "down" : "";
  const full = x && y ? `${x}+${y}` : x || y || "none";
  const found = [full, x, y, "none"].map((name) => game.indexOf(name)).find((index) => index >= 0);
  return { type: "gameact", action: found === undefined ? 0 : found };
}

function hold() {
  if (!welcome) return;
  const next = wanted(), text = JSON.stringify(next);
  if (text === held) return;
  held = text;
  next.number = ++messageNumber;
  sentAt.set(next.number, performance.now());
  if (sentAt.size > 64) sentAt.delete(sentAt.keys().next().value);
  send(next);
}

function press(name) {
  pressed.add(name);
  if (at("pilot").value !== "human") notice(`The policy ${at("pilot").value} is at the controls; H gives them to you.`);
  hold();
}
function release(name) { if (pressed.delete(name)) hold(); }

function see(buffer) {
  const view = new DataView(buffer), now = performance.now();
  if (view.getUint8(0) !== 1) { notice("the server speaks another version; reload the page"); return; }
  const flags = view.getUint8(1), height = view.getUint16(2, true), width = view.getUint16(4, true);
  const channels = view.getUint16(6, true), size = height * width * channels;
  const frame = view.getUint32(8, true), action = view.getInt32(12, true), answered = view.getUint32(16, true);
  const entropy = view.getFloat32(24, true), psnr = view.getFloat32(32, true), stepMs = view.getFloat32(36, true);
  paint(at("dream"), new Uint8Array(buffer, HEADER_BYTES, size), height, width, channels);
  if (flags & REAL) paint(at("real"), new Uint8Array(buffer, HEADER_BYTES + size, size), height, width, channels);
  at("level-ended").hidden = !(flags & LEVEL_ENDED);
  at("drift").hidden = !(flags & DRIFT);
  paused = Boolean(flags & PAUSED);
  recording = Boolean(flags & RECORDING);
  for (const [id, on, text] of [["pause", paused, paused ? "Go on (P)" : "Pause (P)"], ["record", recording, recording ? "End (L)" : "Record (L)"]]) {
    at(id).setAttribute("aria-pressed", on);
    if (at(id).textContent !== text) at(id).textContent = text;
  }
  at("frame").textContent = frame;
  at("dropped").textContent = view.getUint32(20, true);
  if (stepMs > 0) at("model").textContent = `${stepMs.toFixed(1)} ms`;
  at("psnr").textContent = Number.isNaN(psnr) ? "–" : psnr === Infinity ? "equal" : `${psnr.toFixed(1)} dB`;
  for (const button of at("actions").children) button.setAttribute("aria-pressed", Number(button.dataset.action) === action);
  if (sentAt.has(answered) && !paused) {
    latencies.push(now - sentAt.get(answered));
    if (latencies.length > 200) latencies.shift();
    for (const number of [...sentAt.keys()]) if (number <= answered) sentAt.delete(number);
  }
  if (!paused && stepMs > 0) { arrivals.push(now); if (arrivals.length > 60) arrivals.shift(); }
  entropies.push([frame, entropy, Boolean(flags & DRIFT)]);
  if (entropies.length > STRIP_FRAMES) entropies.shift();
  at("entropy").textContent = Number.isNaN(entropy) ? "a true frame" : `${entropy.toFixed(2)} bits a token; warning above ${welcome ? welcome.warn_bits.toFixed(2) : "–"} on average over a second`;
  drawStrip();
}

function paint(canvas, pixels, height, width, channels) {
  if (canvas.width !== width || canvas.height !== height) { canvas.width = width; canvas.height = height; }
  const image = new ImageData(width, height);
  for (let i = 0, j = 0; i < pixels.length; i += channels, j += 4) {
    image.data[j] = pixels[i];
    image.data[j + 1] = pixels[i + (channels > 1 ? 1 : 0)];
    image.data[j + 2] = pixels[i + (channels > 2 ? 2 : 0)];
    image.data[j + 3] = 255;
  }
  canvas.getContext("2d").putImageData(image, 0, 0);
}

function drawStrip() {
  const canvas = at("strip"), pen = canvas.getContext("2d"), style = getComputedStyle(document.documentElement);
  const top = welcome ? Math.max(welcome.warn_bits * 1.5, 1e-3) : 1, bar = canvas.width / STRIP_FRAMES;
  pen.clearRect(0, 0, canvas.width, canvas.height);
  entropies.forEach(([, bits, drift], index) => {
    if (Number.isNaN(bits)) return;
    const tall = Math.min(bits / top, 1) * canvas.height;
    pen.fillStyle = style.getPropertyValue(drift ? "--warn" : "--held");
    pen.fillRect(index * bar, canvas.height - tall, bar, tall);
  });
  if (!welcome) return;
  pen.fillStyle = style.getPropertyValue("--ink");
  pen.fillRect(0, canvas.height * (1 - welcome.warn_bits / top), canvas.width, 1);
}

function figures() {
  const now = performance.now(), recent = arrivals.filter((t) => now - t < 2000);
  at("rate").textContent = paused ? "paused" : recent.length > 1 ? ((recent.length - 1) * 1000 / (recent.at(-1) - recent[0])).toFixed(1) : "–";
  if (latencies.length) {
    const sorted = [...latencies].sort((a, b) => a - b);
    at("p50").textContent = `${sorted[Math.floor(sorted.length * 0.5)].toFixed(0)} ms`;
    at("p95").textContent = `${sorted[Math.floor(sorted.length * 0.95)].toFixed(0)} ms`;
  }
}

const settings = () => ({ type: "settings", temperature: Number(at("temperature").value), decode_steps: Number(at("decode").value), fps: Number(at("fps").value) });
const DO = {
  pause: () => send({ type: "pause", on: !paused }),
  step: () => send({ type: "step" }),
  rewind: () => send({ type: "rewind", frames: 15 }),
  reset: () => send({ type: "reset", clip: Number(at("clip").value) }),
  resync: () => send({ type: "resync" }),
  record: () => send({ type: "record", on: !recording, format: at("format").value }),
};
const KEYS = { p: "pause", " ": "pause", ".": "step", ",": "rewind", r: "reset", y: "resync", l: "record" };
for (const [id, work] of Object.entries(DO)) at(id).addEventListener("click", work);
at("clip").addEventListener("change", DO.reset);
function give(name) { notice(""); send({ type: "pilot", name }); }
at("pilot").addEventListener("change", () => give(at("pilot").value));
// Who has chosen with the pointer wants to steer next: arrows belong to the game again, not to the list.
for (const kind of ["pointerdown", "keydown"]) document.addEventListener(kind, () => { byPointer = kind === "pointerdown"; }, true);
for (const id of ["clip", "pilot", "format"]) at(id).addEventListener("change", () => { if (byPointer) at("dream").focus(); });
for (const id of ["temperature", "decode", "fps"]) at(id).addEventListener("keydown", (event) => { if (event.key === "Enter") at("dream").focus(); });
for (const id of ["temperature", "decode", "fps"]) at(id).addEventListener("change", () => {
  if (at(id).checkValidity()) { notice(""); send(settings()); }
  else notice(`${at(id).labels[0].textContent.trim()}: expected ${at(id).min} to ${at(id).max}`);
});

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("select")) return;
  if (event.target.matches("input")) { // a number takes no letters but e
    if (!/^[hlpry]$/i.test(event.key)) return;
    event.preventDefault();
  }
  if (event.key === " ") {
    if (event.target.matches("button, a")) return; // Space is theirs
    event.preventDefault();
  }
  if (event.key in ARROWS) { event.preventDefault(); press(ARROWS[event.key]); }
  else if (/^[0-9]$/.test(event.key) && welcome && Number(event.key) < welcome.actions.length) press("button" + event.key);
  else if (event.key.toLowerCase() === "h" && !event.repeat && welcome) give(at("pilot").value === "human" ? policy || welcome.pilots.at(-1) : "human");
  else if (event.key.toLowerCase() in KEYS && !event.repeat) { const button = at(KEYS[event.key.toLowerCase()]); if (!button.disabled) button.click(); }
});
document.addEventListener("keyup", (event) => {
  if (event.key in ARROWS) release(ARROWS[event.key]);
  else if (/^[0-9]$/.test(event.key)) release("button" + event.key);
});
window.addEventListener("blur", () => { pressed.clear(); hold(); });
setInterval(figures, 500);
connect();
