// Reads the engine's snapshots, keeps the last steps and lanes, and starts requests as any client of the API does.

import { drawBlocks, drawLanes, under } from "/live/draw.js";

const MAX_STEPS = 400;
// A lane is free for another sequence so many steps after its own has ended.
const LINGER_STEPS = 24;
const RETRY_MS = 1500;
const MAX_ANSWERS = 50;

const $ = (id) => document.getElementById(id);
const view = {
  stats: { blocks: 0 },
  sequences: [],
  cachedRanges: [],
  // Block id -> sequences that own it.
  owners: new Map(),
  // The highest id of a block that was ever in use: those above it are free.
  highestBlock: 0,
  // Those that are drawn, oldest first.
  steps: [],
  // {key, number, index, id, ...}, or null where none is.
  lanes: [],
};
// Steps that have come, and are not drawn yet.
const pending = [];
const mine = new Set();
let key = "";
let model = "";
let isDirty = true;

const keyOf = (number, index) => `${number}/${index}`;
const headers = () => (key ? { authorization: `Bearer ${key}` } : {});

// ------------------------------------------------------------------------------------------------- snapshots

/** Server-sent events of an answer: [event, value] each. EventSource could not send a key. */
async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    const frames = text.split("\n\n");
    text = frames.pop();
    for (const frame of frames) {
      const fields = Object.fromEntries(frame.split("\n").map((line) => line.split(/: (.*)/s)));
      if (fields.data) yield [fields.event ?? "message", fields.data];
    }
  }
}

async function watch() {
  for (;;) {
    try {
      const response = await fetch("/live/events", { headers: headers() });
      if (response.status === 401 || response.status === 403) {
        await askForKey(await problemOf(response));
        continue;
      }
      if (!response.ok) throw new Error(await problemOf(response));
      await nameModel();
      for await (const [event, data] of eventsOf(response)) {
        if (event === "problem") throw new Error(JSON.parse(data).error.message);
        take(JSON.parse(data));
        say("live", "live");
      }
      throw new Error("the server has gone");
    } catch (error) {
      say(error instanceof TypeError ? "no server answers; trying again" : `${error.message}; trying again`, "lost");
      // It may be another server that answers next.
      view.steps.length = pending.length = view.lanes.length = view.highestBlock = 0;
      isDirty = true;
      await new Promise((resolve) => setTimeout(resolve, RETRY_MS));
    }
  }
}

async function problemOf(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `HTTP status ${response.status}`;
  }
}

async function nameModel() {
  const response = await fetch("/v1/models", { headers: headers() });
  if (!response.ok) return;
  model = (await response.json()).data[0].id;
  $("model").textContent = model;
}

function say(text, kind) {
  $("state").textContent = text;
  $("state").className = kind;
}

function askForKey(why) {
  say("needs a key", "lost");
  $("key-problem").textContent = key ? why : "This server shows what it does to operators alone.";
  $("key-dialog").showModal();
  return new Promise((resolve) => $("key-dialog").addEventListener("close", resolve, { once: true }));
}

$("key-form").addEventListener("submit", () => {
  key = $("key").value;
  $("key").value = "";
});
$("key-dialog").addEventListener("cancel", (event) => event.preventDefault());

function take(snapshot) {
  view.stats = snapshot.stats;
  view.sequences = snapshot.sequences;
  view.cachedRanges = snapshot.cached;
  view.owners = new Map();
  for (const sequence of snapshot.sequences) {
    sequence.key = keyOf(sequence.number, sequence.index);
    for (const id of sequence.blocks) view.owners.set(id, (view.owners.get(id) ?? 0) + 1);
  }
  view.byKey = new Map(snapshot.sequences.map((sequence) => [sequence.key, sequence]));
  pending.push(...snapshot.steps.map(readStep));
  // A page in the background draws nothing.
  pending.splice(0, pending.length - MAX_STEPS);
  showFigures(snapshot);
  showQueue(snapshot);
  // Not by one Math.max of all: a large cache has more blocks than a call may have arguments.
  const note = (id) => { view.highestBlock = Math.max(view.highestBlock, id); };
  view.owners.forEach((_, id) => note(id));
  view.cachedRanges.forEach(([start, count]) => note(start + count - 1));
  isDirty = true;
}

function readStep(step) {
  const sum = (place) => step.parts.reduce((total, part) => total + part[place], 0);
  return {
    ...step,
    tokens: sum(3),
    promptTokens: sum(4),
    accepted: sum(6),
    // Of its own snapshot: one that has ended may be missing from the next, which may be here before the step is drawn.
    sequences: view.byKey,
    // [start, tokens, promptTokens, guessed, accepted] of each sequence.
    parts: new Map(step.parts.map(([number, index, ...part]) => [keyOf(number, index), part])),
    preempted: new Set(step.preemptions.map(([number, index]) => keyOf(number, index))),
  };
}

// ------------------------------------------------------------------------------------------------------ lanes

/** Draw the next step: sequences join, go on, and leave. */
function showStep(step) {
  view.steps.push(step);
  if (view.steps.length > MAX_STEPS) view.steps.shift();
  for (const laneKey of step.preempted) {
    const lane = view.lanes.find((each) => each?.key === laneKey);
    if (lane) Object.assign(lane, { computed: 0, phase: "preempted", chunks: [] });
  }
  for (const [laneKey, [start, tokens, promptTokens, , accepted]] of step.parts) {
    const lane = view.lanes.find((each) => each?.key === laneKey) ?? join(laneKey, step);
    // What precedes its first part since it got its blocks, it has from the cache.
    if (lane.computed === 0) lane.cached = start;
    lane.lastStep = step.number;
    lane.phase = "running";
    lane.computed = start + tokens + accepted;
    // A guess may be the last token of all: no other comes behind it.
    const most = step.sequences.get(laneKey)?.completion ?? Infinity;
    lane.completion = Math.max(lane.completion, Math.min(lane.computed + 1 - lane.prompt, most), 0);
    if (promptTokens) lane.chunks.push([start, start + tokens]);
    if (accepted) lane.accepted.push([start + tokens, lane.computed]);
  }
}

function join(laneKey, step) {
  // The server leaves out some of very many.
  const sequence = step.sequences.get(laneKey) ?? { id: "", prompt: 0 };
  const [number, index] = laneKey.split("/").map(Number);
  const lane = {
    key: laneKey, number, index, id: sequence.id, adapter: sequence.adapter ?? "", prompt: sequence.prompt, cached: 0, isMine: mine.has(sequence.id),
    firstStep: step.number, lastStep: step.number, computed: 0, completion: 0, chunks: [], accepted: [], blocks: [], isOver: false, phase: "running",
  };
  const free = view.lanes.findIndex((each) => each === null || (each.isOver && step.number - each.lastStep > LINGER_STEPS));
  view.lanes[free < 0 ? view.lanes.length : free] = lane;
  return lane;
}

/** What only the last snapshot says of the lanes. */
function refreshLanes() {
  const newest = view.steps.at(-1)?.number ?? 0;
  view.lanes.forEach((lane, i) => {
    if (!lane) return;
    const sequence = view.byKey.get(lane.key);
    lane.blocks = sequence?.blocks ?? [];
    const isDrawn = !pending.some((step) => step.parts.has(lane.key));
    lane.isOver = isDrawn && (!sequence || sequence.phase === "ended");
    if (lane.isOver && newest - lane.lastStep > 3 * LINGER_STEPS) view.lanes[i] = null;
  });
  while (view.lanes.length && view.lanes.at(-1) === null) view.lanes.pop();
}

function draw() {
  // Steps come in bunches, and are drawn one after the other.
  for (let count = Math.ceil(pending.length / 8); count > 0; count--) showStep(pending.shift());
  if (isDirty || pending.length) {
    isDirty = pending.length > 0;
    refreshLanes();
    drawLanes($("lanes"), view);
    const numLeftOut = drawBlocks($("blocks"), view);
    $("more-blocks").textContent = numLeftOut > 0 ? `and ${numLeftOut} more, never used so far` : "";
    $("idle").hidden = view.stats.running + view.stats.waiting > 0;
  }
  requestAnimationFrame(draw);
}

// ---------------------------------------------------------------------------------------------- figures, queue

function showFigures({ stats, steps }) {
  $("tokens-per-second").textContent = stats.tokens_per_second.toFixed(0);
  $("running").textContent = stats.running;
  $("waiting").textContent = stats.waiting;
  $("used").textContent = `${stats.used_blocks} of ${stats.blocks}`;
  $("hits").textContent = `${(stats.hit_ratio * 100).toFixed(0)} %`;
  $("right").textContent = `${(stats.acceptance_ratio * 100).toFixed(0)} %`;
  $("preemptions").textContent = stats.preemptions;
  const times = steps.filter((step) => step.parts.length).map((step) => step.ms);
  if (times.length) $("step-time").textContent = `${(times.reduce((a, b) => a + b) / times.length).toFixed(1)} ms`;
}

function showQueue({ sequences, steps, stats }) {
  const waiting = sequences.filter((each) => each.phase === "waiting" || each.phase === "preempted");
  $("queue").replaceChildren(
    ...waiting.slice(0, 100).map((sequence) => {
      const name = element("b", sequence.id || "…");
      const what = sequence.phase === "preempted" ? "preempted" : sequence.number ? `${sequence.prompt} tokens` : "being encoded";
      return element("li", name, element("span", `${what}${ofAdapter(sequence)}, ${sequence.age_s.toFixed(1)} s`));
    }),
  );
  const wait = steps.at(-1)?.wait;
  const reason = wait ? `The first waits for ${wait}.` : "";
  $("queue-reason").textContent = stats.waiting ? reason : "Nobody waits.";
}

const ofAdapter = ({ adapter }) => (adapter ? `, adapter ${adapter}` : "");

function element(name, ...children) {
  const made = document.createElement(name);
  made.append(...children);
  return made;
}

// ------------------------------------------------------------------------------------------------ explanations

let explainedId = "";

async function explain(id) {
  explainedId = id;
  $("explanation").hidden = false;
  $("explained").textContent = id;
  const response = await fetch(`/live/explain?id=${encodeURIComponent(id)}`, { headers: headers() });
  if (explainedId !== id) return;
  if (!response.ok) {
    $("summary").textContent = await problemOf(response);
    $("timeline").replaceChildren();
    return;
  }
  const [timeline] = (await response.json()).timelines;
  $("summary").textContent = timeline.summary;
  $("timeline").replaceChildren(...timeline.entries.map((entry) => timelineRow(entry, timeline.duration_s)));
  $("explanation").scrollIntoView({ block: "nearest" });
}

function timelineRow(entry, total_s) {
  const row = element("li", element("time", `${entry.start_s.toFixed(3)} s`), element("span", entry.text));
  row.className = entry.kind;
  if (entry.duration_s > 0) {
    const bar = element("div");
    bar.className = "bar";
    bar.style.width = `${Math.max(1, (entry.duration_s / total_s) * 100)}%`;
    bar.style.marginLeft = `${(entry.start_s / total_s) * 100}%`;
    row.append(bar);
  }
  return row;
}

$("close-explanation").addEventListener("click", () => {
  explainedId = "";
  $("explanation").hidden = true;
});

const pointed = (event) => under(view, $("lanes").clientWidth, event.offsetX, event.offsetY);

$("lanes").addEventListener("click", (event) => {
  const { lane } = pointed(event);
  if (lane?.id) explain(lane.id);
});
$("lanes").addEventListener("mousemove", (event) => {
  const { lane, step } = pointed(event);
  const lines = [];
  if (lane) {
    lines.push(`${lane.id || "…"}${ofAdapter(lane)}: ${lane.prompt} prompt tokens, ${lane.cached} tokens from the cache, ${lane.completion} generated`);
    if (step) lines.push(partText(step.parts.get(lane.key), step.preempted.has(lane.key)));
  }
  if (step) lines.push(`step ${step.number}: ${step.tokens + step.accepted} tokens in ${step.ms} ms`);
  const tip = $("tip");
  tip.hidden = lines.length === 0;
  tip.textContent = lines.join("\n");
  tip.style.top = `${event.clientY + 16}px`;
  tip.style.left = `${Math.min(event.clientX + 12, window.innerWidth - tip.offsetWidth - 8)}px`;
});
$("lanes").addEventListener("mouseleave", () => ($("tip").hidden = true));

function partText(part, isPreempted) {
  if (isPreempted) return "it lost its KV blocks";
  if (!part) return "it was not in this step";
  const [start, tokens, promptTokens, guessed, accepted] = part;
  if (promptTokens) return `computed its tokens ${start} to ${start + tokens - 1}`;
  return guessed ? `gave a token, and ${accepted} of ${guessed} guesses were right` : "gave a token";
}

// ------------------------------------------------------------------------------------------------ your prompts

let numSent = 0;

$("prompt-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const maxTokens = Number($("max-tokens").value);
  for (let i = 0; i < Number(event.submitter?.value ?? 1); i++) send($("prompt").value, maxTokens);
});

/** Start a request, and show its answer as it comes. */
async function send(prompt, maxTokens) {
  const id = `you-${++numSent}`;
  mine.add(id);
  const text = element("span");
  const row = element("li", element("b", id), text);
  row.addEventListener("click", () => explain(id));
  $("mine-section").hidden = false;
  $("mine").prepend(row);
  while ($("mine").children.length > MAX_ANSWERS) $("mine").lastChild.remove();
  try {
    const response = await fetch("/v1/chat/completions", {
      method: "POST",
      headers: { "content-type": "application/json", "x-request-id": id, ...headers() },
      body: JSON.stringify({ model, messages: [{ role: "user", content: prompt }], max_tokens: maxTokens, stream: true }),
    });
    if (!response.ok) throw new Error(await problemOf(response));
    for await (const [, data] of eventsOf(response)) {
      if (data === "[DONE]") continue;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      text.append(chunk.choices[0]?.delta?.content ?? "");
    }
  } catch (error) {
    text.append(element("span", ` ${error.message}`));
    row.classList.add("failed");
  }
}

watch();
requestAnimationFrame(draw);
