// Draws what page.js knows: lanes (a sequence each), and the map of KV blocks. Keeps nothing between two calls.

const style = getComputedStyle(document.documentElement);
const color = Object.fromEntries(
  ["panel", "line", "text", "soft", "prompt", "cached", "token", "guessed", "preempted", "kept", "free"].map((name) => [
    name,
    style.getPropertyValue(`--${name}`).trim(),
  ]),
);
const FONT = "12px system-ui, 'DejaVu Sans', sans-serif";
const SMALL = "10.5px system-ui, 'DejaVu Sans', sans-serif";

// Of the lanes' canvas, in CSS pixels.
const HEAD = 62;
const ROW = 21;
const STEP = 8;
const LABEL = 138;
const BLOCKS = 118;

/** The color of a request: neighbours are far apart. */
export const hueOf = (number) => `hsl(${(number * 137.5 + 200) % 360} 62% 66%)`;

/** The canvas's drawing context, sharp on any screen, and empty. */
function prepare(canvas, width, height) {
  const scale = window.devicePixelRatio || 1;
  canvas.style.height = `${height}px`;
  canvas.width = Math.round(width * scale);
  canvas.height = Math.round(height * scale);
  const pen = canvas.getContext("2d");
  pen.scale(scale, scale);
  pen.textBaseline = "middle";
  return pen;
}

function box(pen, fill, x, y, width, height) {
  pen.fillStyle = fill;
  pen.fillRect(x, y, width, height);
}

function write(pen, text, x, y, fill = color.soft, font = SMALL) {
  pen.fillStyle = fill;
  pen.font = font;
  pen.fillText(text, x, y);
}

function shorten(pen, text, width) {
  if (pen.measureText(text).width <= width) return text;
  while (text && pen.measureText(`${text}…`).width > width) text = text.slice(0, -1);
  return `${text}…`;
}

// ------------------------------------------------------------------------------------------------------ lanes

/** Where things lie on the lanes' canvas, `width` wide. */
export function layout(width) {
  const tokens = Math.max(120, Math.min(360, (width - LABEL - BLOCKS) * 0.42));
  const steps = LABEL + tokens + BLOCKS + 26;
  return { tokens: LABEL, tokensWidth: tokens, blocks: LABEL + tokens + 14, steps, columns: Math.floor((width - steps) / STEP) };
}

/** The lane and step under a point: {lane, step}, either undefined if there is none. */
export function under(view, width, x, y) {
  const place = layout(width);
  const lane = view.lanes[Math.floor((y - HEAD) / ROW)] ?? undefined;
  const column = Math.floor((x - place.steps) / STEP);
  const steps = shownSteps(view, place.columns);
  const step = column >= 0 ? steps[column - (place.columns - steps.length)] : undefined;
  return { lane: lane ?? undefined, step };
}

const shownSteps = (view, columns) => view.steps.slice(Math.max(0, view.steps.length - columns));

export function drawLanes(canvas, view) {
  const width = canvas.parentElement.clientWidth;
  const place = layout(width);
  const pen = prepare(canvas, width, HEAD + ROW * view.lanes.length + 4);
  const steps = shownSteps(view, place.columns);
  const firstX = place.steps + (place.columns - steps.length) * STEP;
  drawHead(pen, place, steps, firstX);
  const longest = Math.max(24, ...view.lanes.map((lane) => (lane ? lane.prompt + lane.completion + 8 : 0)));
  view.lanes.forEach((lane, i) => {
    const y = HEAD + i * ROW;
    if (i % 2 === 0) box(pen, "#ffffff07", 0, y, width, ROW);
    if (!lane) return;
    pen.globalAlpha = lane.isOver ? 0.45 : 1;
    drawLabel(pen, lane, y);
    drawTokens(pen, lane, place, y, place.tokensWidth / longest);
    drawTable(pen, lane, place, y, view.owners);
    pen.globalAlpha = 1;
    steps.forEach((step, j) => drawCell(pen, lane, step, firstX + j * STEP, y));
  });
}

function drawHead(pen, place, steps, firstX) {
  const y = HEAD - 9;
  write(pen, "request", 0, y);
  write(pen, "its tokens", place.tokens, y);
  write(pen, "its KV blocks", place.blocks, y);
  write(pen, "tokens in each step", place.steps, 8);
  const most = Math.max(8, ...steps.map((step) => step.tokens + step.accepted));
  const height = HEAD - 24;
  steps.forEach((step, j) => {
    const x = firstX + j * STEP;
    const generated = Math.max(1, Math.round(((step.tokens - step.promptTokens) / most) * height));
    const prompt = step.promptTokens ? Math.max(2, Math.round((step.promptTokens / most) * height)) : 0;
    box(pen, color.prompt, x, HEAD - 4 - prompt, STEP - 1.5, prompt);
    if (step.tokens > step.promptTokens) box(pen, color.token, x, HEAD - 4 - prompt - generated, STEP - 1.5, generated);
    const accepted = step.accepted ? Math.max(2, Math.round((step.accepted / most) * height)) : 0;
    box(pen, color.guessed, x, HEAD - 4 - prompt - generated - accepted, STEP - 1.5, accepted);
    if (step.failed) box(pen, color.preempted, x, HEAD - 4, STEP - 1.5, 3);
  });
  box(pen, color.line, 0, HEAD - 2, 4000, 1);
}

function drawLabel(pen, lane, y) {
  box(pen, hueOf(lane.number), 0, y + 6, 4, ROW - 12);
  pen.font = FONT;
  const name = (lane.id || "…") + (lane.index ? ` · ${lane.index}` : "");
  const fill = lane.phase === "preempted" ? color.preempted : lane.isMine ? color.token : color.text;
  write(pen, shorten(pen, name, LABEL - 22), 10, y + ROW / 2, fill, FONT);
}

/** A cell for each token, if there is room: cached, computed in chunks, generated, guessed right, or still to come. */
function drawTokens(pen, lane, place, y, scale) {
  const unit = Math.min(7, scale);
  const gap = unit >= 3 ? 1 : 0;
  const cell = (fill, from, until) => {
    if (gap) for (let i = from; i < until; i++) box(pen, fill, place.tokens + i * unit, y + 5, unit - gap, ROW - 10);
    else if (until > from) box(pen, fill, place.tokens + from * unit, y + 5, (until - from) * unit, ROW - 10);
  };
  const isOut = lane.phase === "preempted";
  cell(isOut ? "#f0616d55" : color.free, 0, lane.prompt + (isOut ? lane.completion : 0));
  cell(color.cached, 0, Math.min(lane.cached, lane.computed));
  lane.chunks.forEach(([start, end], i) => {
    cell(i % 2 ? "#3f78c4" : color.prompt, Math.max(start, lane.cached), Math.min(end, lane.prompt, lane.computed));
  });
  if (!isOut) {
    cell(color.token, lane.prompt, lane.prompt + lane.completion);
    for (const [start, end] of lane.accepted) cell(color.guessed, start, end);
  }
  if (!lane.isOver && lane.completion && !isOut) cell("#d9fbe9", lane.prompt + lane.completion - 1, lane.prompt + lane.completion);
}

/** The block table: shared blocks stand out. */
function drawTable(pen, lane, place, y, owners) {
  const most = Math.floor((BLOCKS - 26) / 7);
  const shown = lane.blocks.length > most ? lane.blocks.slice(0, most) : lane.blocks;
  shown.forEach((id, i) => {
    box(pen, owners.get(id) > 1 ? color.cached : hueOf(lane.number), place.blocks + i * 7, y + 7, 6, ROW - 14);
  });
  if (shown.length < lane.blocks.length) {
    write(pen, `+${lane.blocks.length - shown.length}`, place.blocks + most * 7 + 2, y + ROW / 2);
  }
}

function drawCell(pen, lane, step, x, y) {
  const part = step.parts.get(lane.key);
  const height = ROW - 8;
  if (step.preempted.has(lane.key)) {
    box(pen, color.preempted, x, y + 4, STEP - 1.5, height);
  } else if (part) {
    const [start, , promptTokens, , accepted] = part;
    box(pen, promptTokens ? color.prompt : color.token, x, y + 4, STEP - 1.5, height);
    if (accepted) box(pen, color.guessed, x, y + 4, STEP - 1.5, 5);
    // Its first step, and a part of its prompt came from the cache.
    if (start && lane.firstStep === step.number) box(pen, color.cached, x, y + 4, STEP - 1.5, 5);
  } else if (step.number > lane.firstStep && step.number < lane.lastStep) {
    box(pen, color.line, x + 2.5, y + ROW / 2 - 1, 2, 2);
  }
}

// ------------------------------------------------------------------------------------------------- KV blocks

/** A square for each block, up to the last that was ever in use. Returns how many are left out, all of them free. */
export function drawBlocks(canvas, view) {
  const width = canvas.parentElement.clientWidth - 28;
  const shown = Math.min(view.stats.blocks, Math.max(256, 2 ** Math.ceil(Math.log2(view.highestBlock + 1))));
  // As large as fits the height, too.
  const size = Math.max(2, Math.min(14, Math.floor(Math.sqrt((width * 300) / Math.max(1, shown)))));
  const columns = Math.max(1, Math.floor(width / size));
  const gap = size > 3 ? 1 : 0.5;
  const pen = prepare(canvas, width, Math.ceil(shown / columns) * size);
  const put = (id, fill) => box(pen, fill, (id % columns) * size, Math.floor(id / columns) * size, size - gap, size - gap);
  for (let id = 0; id < shown; id++) put(id, color.free);
  for (const [start, length] of view.cachedRanges) for (let id = start; id < start + length; id++) put(id, color.kept);
  for (const sequence of view.sequences) {
    for (const id of sequence.blocks) put(id, view.owners.get(id) > 1 ? color.cached : hueOf(sequence.number));
  }
  return view.stats.blocks - shown;
}
