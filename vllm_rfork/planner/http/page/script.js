// The dashboard: fetches /dashboard.json every few seconds and shows it with the tables of elements.js.
const TOKEN = "rfork-token";
const ANSWER_MS = 10000;
const MAX_PAUSE_MS = 15000;

let received = 0; // when the present data came, on our clock
let data = null;
const since = (age, more) => ({ zero: received - age, ...more });
const till = (left, more) => ({ zero: received + left, until: true, ...more });
const keyCell = (key) => ({ text: key || "(not known yet)", title: key, mono: true, link: key ? linkTo(key) : undefined });
const mono = (text) => ({ text, mono: true });

function stateOf(seed) {
  if (seed.absent) return { text: "absent", badge: true, tone: "bad", sub: "its presence connection broke" };
  if (seed.draining) return { text: "draining", badge: true, tone: "warn", sub: "gets no new lease" };
  if (seed.aside_s > 0) return till(seed.aside_s, { before: "quarantined for ", badge: true, tone: "bad", sub: seed.causes, title: seed.causes });
  if (seed.held_s > 0) return till(seed.held_s, { before: "not granted for ", badge: true, tone: "warn", sub: "known to an earlier state" });
  const sub = seed.failures ? `failed for ${counted(seed.failures, "receiver")} in a row` : "";
  if (seed.leases >= seed.slots) return { text: "busy", badge: true, sub };
  return { text: "free", badge: true, tone: "good", sub };
}

const RESULTS = { ok: ["ok", "good"], failed: ["failed", "bad"], expired: ["expired", "bad"], released: ["released", ""] };
let fastest = 1;
const tables = {
  keys: new Table("keys", [
    ["Key", "key", (each) => keyCell(each.key)],
    ["Seeds", "num", (each) => ({ text: count.format(each.seeds), sub: troubles(each) })],
    ["Slots in use", "num", (each) => ({ text: `${count.format(each.leases)} / ${count.format(each.slots)}`, bar: each.slots ? each.leases / each.slots : 0 })],
    ["Waiting", "num", (each) => (each.waiting ? { text: count.format(each.waiting), tone: "warn" } : { text: "0" })],
    ["Oldest wait", "num", (each) => (each.waiting ? since(each.oldest_wait_s, { tone: "warn" }) : { text: "" })],
    ["Loading", "num", (each) => ({ text: count.format(each.intents) })],
  ], (each) => each.key),
  leases: new Table("leases", [
    ["Receiver", "nowrap", (each) => mono(each.receiver)],
    ["From seed", "nowrap", (each) => mono(each.seed)],
    ["Since", "num", (each) => since(each.held_s)],
    ["Lease ends in", "num", (each) => till(each.expires_in_s, { tone: each.expires_in_s < 5 ? "warn" : undefined })],
    ["Key", "key", (each) => keyCell(each.key)],
  ], (each) => `${each.lease} ${each.seed} ${each.receiver}`, "No receiver forks at the moment."),
  waiting: new Table("waiting", [
    ["Place", "nowrap", (each) => ({ text: `${each.place} of ${lengthOf(each.key)}` })],
    ["Receiver", "nowrap", (each) => mono(each.receiver)],
    ["Waits", "num", (each) => since(each.waited_s)],
    ["At most", "num", (each) => ({ text: time(each.wait_s) })],
    ["Key", "key", (each) => keyCell(each.key)],
  ], (each) => `${each.key}\n${each.place}`, "No receiver waits for a seed."),
  seeds: new Table("seeds", [
    ["Seed", "nowrap", (each) => ({ text: each.seed, mono: true, sub: labelsOf(each) })],
    ["State", "nowrap", stateOf],
    ["Leases", "num", (each) => ({ text: `${each.leases} / ${each.slots}`, bar: each.leases / each.slots })],
    ["Last seen", "num", (each) => since(each.seen_s_ago, { after: " ago", tone: each.seen_s_ago > data.planner.stale_s * 0.75 ? "warn" : undefined })],
    ["Seed for", "num", (each) => since(each.age_s)],
    ["Key", "key", (each) => keyCell(each.key)],
  ], (each) => each.seed, "There are no seeds. A worker appears here when it has loaded its weights and announces itself."),
  history: new Table("history", [
    ["Ended", "num", (each) => since(each.ago_s, { after: " ago" })],
    ["Result", "nowrap", (each) => ({ text: RESULTS[each.result]?.[0] ?? each.result, badge: true, tone: RESULTS[each.result]?.[1], sub: [each.cause, each.side && `side: ${each.side}`].filter(Boolean).join(", ") })],
    ["Receiver", "nowrap", (each) => mono(each.receiver)],
    ["From seed", "nowrap", (each) => mono(each.seed)],
    ["Lane", "nowrap", (each) => mono(each.lane)],
    ["Bytes", "num", (each) => ({ text: each.nbytes ? bytes(each.nbytes) : "" })],
    // If the receiver reported no time it is that of the lease, which is longer than the fork.
    ["Time", "num", (each) => ({ text: time(each.duration_s, true), sub: each.of_lease ? "of the lease" : "" })],
    ["GB/s", "num", (each) => (!each.gb_per_s ? { text: "" } : each.of_lease ? { text: `≥ ${rate(each.gb_per_s)}` } : { text: rate(each.gb_per_s), bar: each.gb_per_s / fastest })],
    ["Caches", "nowrap", (each) => cachesOf(each.caches)],
    ["Key", "key", (each) => keyCell(each.key)],
  ], (each) => `${each.receiver} ${each.seed} ${each.result} ${each.duration_s} ${each.nbytes}`, "No fork has ended yet."),
  causes: new Table("causes", [
    ["Cause", "nowrap", (each) => ({ text: each.cause, tone: "bad" })],
    ["Forks", "num", (each) => ({ text: count.format(each.count) })],
    ["Last", "num", (each) => since(each.ago_s, { after: " ago" })],
    ["At seed", "nowrap", (each) => mono(each.seed)],
    ["Key", "key", (each) => keyCell(each.key)],
  ], (each) => each.cause, "No fork failed."),
  intents: new Table("intents", [
    ["Worker", "", (each) => mono(each.intent)],
    ["Key", "key", (each) => keyCell(each.key)],
  ], (each) => `${each.key}\n${each.intent}`, "No worker loads from storage."),
};

function troubles(each) {
  const words = [];
  if (each.aside) words.push(`${count.format(each.aside)} quarantined`);
  if (each.absent) words.push(`${count.format(each.absent)} absent`);
  if (each.draining) words.push(`${count.format(each.draining)} draining`);
  return words.join(", ");
}

// Reported once the receiver is a seed itself.
function cachesOf(caches) {
  if (!caches) return { text: "" };
  const missed = Object.entries(caches.misses).map(([kind, reason]) => (reason ? `${kind} (${reason})` : kind));
  const text = [caches.hits.length && counted(caches.hits.length, "hit"), missed.length && `${count.format(missed.length)} missed`].filter(Boolean).join(", ");
  const title = [caches.hits.length && `Used: ${caches.hits.join(", ")}.`, missed.length && `Missed: ${missed.join(", ")}.`].filter(Boolean).join(" ");
  return { text, sub: caches.saved_s ? `saved ${time(caches.saved_s)}` : "", title };
}

function labelsOf(seed) {
  return Object.entries(seed.labels).map(([name, value]) => `${name}=${value}`).join(" ");
}

function lengthOf(key) {
  return count.format(data.keys.find((each) => each.key === key)?.waiting ?? 0);
}

// --- the whole ---------------------------------------------------------------------------------------------------
function tile(id, value, sub, tone) {
  const parts = [element("b", "", value)];
  if (sub instanceof Element) parts.push(sub);
  else parts.push(element("span", tone, sub));
  $(id).replaceChildren(...parts);
}

function show() {
  const key = data.key;
  const known = key === null ? data.fleet : data.keys.find((each) => each.key === key);
  const all = known ?? nothing();
  const forks = data.forks;
  $("about").textContent = plain(`${data.planner.version} · ${data.planner.store} store · ${data.planner.policy} · up with this state for ${time(data.age_s)}`);
  $("chosen").hidden = key === null;
  $("board").toggleAttribute("data-one", key !== null);
  // Zeros would look like a key that exists and has nothing.
  $("tiles").hidden = !known;
  $("lists").hidden = !known && !data.history.length;
  $("unknown").hidden = !!known;
  $("chosen-key").textContent = plain(key);
  tile("tile-seeds", count.format(all.seeds), troubles(all) || (all.seeds ? "all serving" : "none yet"), all.aside || all.absent ? "bad" : all.draining ? "warn" : "");
  const slots = all.slots ? `${counted(all.slots, "slot")}, ${Math.round((100 * all.leases) / all.slots)} % in use` : "no slots";
  tile("tile-leases", count.format(all.leases), data.leases.length ? ticking("span", received - data.leases[0].held_s, { before: `${slots}; longest for ` }) : slots);
  tile("tile-waiting", count.format(all.waiting), all.waiting ? ticking("span", received - all.oldest_wait_s, { before: "longest for ", className: "warn" }) : "nobody");
  tile("tile-intents", count.format(all.intents), all.intents ? "will be seeds soon" : "nobody");
  const lost = forks.failed + forks.expired;
  tile("tile-forks", forks.gb_per_s ? `${rate(forks.gb_per_s)} GB/s` : forks.count ? count.format(forks.count) : "none",
    forks.count ? `${count.format(forks.ok)} ok${lost ? `, ${count.format(lost)} failed` : ""}${forks.nbytes ? ` · ${bytes(forks.nbytes)}` : ""}` : "", lost ? "bad" : "");
  fastest = Math.max(...data.history.map((each) => (each.of_lease ? 0 : each.gb_per_s ?? 0)), 0.001);
  showKeys();
  for (const name of ["leases", "waiting", "seeds", "intents"]) {
    tables[name].fill(data[name], part(data[name].length, all[name], name));
  }
  tables.history.fill(data.history, part(data.history.length, forks.count, "history"));
  tables.causes.fill(data.causes, forks.count ? `Of the last ${counted(forks.count, "fork")}, ${time(forks.since_s)} back.` : "");
  const waiting = data.fleet.waiting ? `${count.format(data.fleet.waiting)} waiting · ` : "";
  document.title = `${waiting}RFork planner`;
  $("foot").textContent = "Complete data: vllm-rfork seeds, vllm-rfork leases, /debug/snapshot, /metrics.";
  const young = data.age_s < data.planner.stale_s;
  notice(!data.planner.ready ? "This planner is stopping: it accepts no new receivers."
    : young && !data.fleet.seeds ? "This planner has just started. Seeds return with their next heartbeat, within 30 seconds."
    : "");
}

function nothing() {
  return { seeds: 0, draining: 0, aside: 0, absent: 0, slots: 0, leases: 0, waiting: 0, intents: 0, oldest_wait_s: 0 };
}

function part(shown, there, name) {
  if (shown >= there) return "";
  const which = { seeds: "those in trouble first", leases: "the oldest of each key", waiting: "the first of each queue", history: "the youngest", intents: "" }[name];
  return `${count.format(shown)} of ${count.format(there)} are listed${which ? `, ${which}` : ""}.`;
}

function matching() {
  const wanted = $("filter").value.trim().toLowerCase();
  return data.keys.filter((each) => each.key.toLowerCase().includes(wanted));
}

function showKeys() {
  const found = matching();
  const there = data.fleet.keys;
  const cut = data.keys.length < there ? `${count.format(data.keys.length)} of ${counted(there, "key")} are listed, those with waiting receivers first. Enter a whole key above to open another one.` : "";
  tables.keys.fill(found, cut, there ? (cut ? "No listed key contains this text. Enter opens the key with exactly this name." : "No key contains this text.") : "There are no keys: no seed and no receiver has contacted this planner.");
}

function hint(text) {
  $("hint").hidden = !text;
  $("hint").textContent = text;
}

function notice(text) {
  $("notice").hidden = !text;
  if ($("notice").textContent !== text) $("notice").textContent = text;
}

// --- asking ------------------------------------------------------------------------------------------------------
let turn = 0; // answers to earlier requests are not shown
let timer = 0;
let failures = 0;
let refusedToken = false;

const linkTo = (key) => `#key=${encodeURIComponent(key)}`;

function chosenKey() {
  if (!location.hash.startsWith("#key=")) return "";
  try {
    return decodeURIComponent(location.hash.slice(5));
  } catch {
    return "";
  }
}

function headers() {
  const sent = { Accept: "application/json" };
  const key = chosenKey();
  if (key) sent.SEED_KEY = /^(?!UTF-8'')[\x21-\x7e]([\x20-\x7e]*[\x21-\x7e])?$/.test(key) ? key : `UTF-8''${encodeURIComponent(key)}`;
  const token = sessionStorage.getItem(TOKEN);
  if (token) sent.Authorization = `Bearer ${token}`;
  return sent;
}

function live(state, text) {
  if ($("live").dataset.state !== state) $("live").dataset.state = state;
  if ($("live").textContent !== text) $("live").textContent = text;
}

function trouble(text) {
  $("trouble").hidden = !text;
  if ($("trouble").textContent !== text) $("trouble").textContent = text;
  $("board").toggleAttribute("data-old", !!text);
}

async function ask() {
  clearTimeout(timer);
  const mine = (turn += 1);
  let answer, body;
  try {
    answer = await fetch("dashboard.json", { headers: headers(), cache: "no-store", redirect: "error", signal: AbortSignal.timeout(ANSWER_MS) });
    body = answer.ok ? await answer.json() : (await answer.text()).slice(0, 300).trim();
  } catch {
    if (mine === turn) gone("no answer", "The planner does not answer.");
    return;
  }
  if (mine !== turn) return;
  if (answer.status === 401) return askForToken();
  if (!answer.ok) {
    const text = answer.status === 429 ? "Too many people use this dashboard." : `The planner answered ${answer.status}: ${plain(body)}.`;
    return gone("no data", text, 1000 * Number(answer.headers.get("Retry-After")) || 0);
  }
  [failures, refusedToken] = [0, false];
  [data, received] = [body, clock()];
  trouble("");
  live("live", "live");
  $("login").hidden = true;
  $("board").hidden = false;
  $("forget").hidden = !sessionStorage.getItem(TOKEN);
  show();
  again(1000 * data.planner.every_s);
}

function gone(state, text, atLeast = 0) {
  failures += 1;
  const pause = Math.max(atLeast, Math.min(MAX_PAUSE_MS, 500 * 2 ** failures));
  live("gone", state);
  document.title = `${state} · RFork planner`;
  notice("");
  const old = data ? ` The data below is ${time(clock() - received)} old.` : "";
  trouble(`${text}${old} Trying again every ${Math.round(pause / 1000)} s.`);
  again(pause);
}

function askForToken() {
  refusedToken = !!sessionStorage.getItem(TOKEN);
  sessionStorage.removeItem(TOKEN);
  data = null;
  for (const each of Object.values(tables)) each.fill([]);
  for (const each of document.querySelectorAll("#tiles dd, #about")) each.replaceChildren();
  $("board").hidden = true;
  $("forget").hidden = true;
  document.title = "RFork planner";
  notice("");
  trouble(refusedToken ? "The planner rejected this token." : "");
  live("asking", "token required");
  if ($("login").hidden) {
    $("login").hidden = false;
    $("token").focus();
  }
}

function again(pauseMs) {
  clearTimeout(timer);
  if (!document.hidden) timer = setTimeout(ask, pauseMs);
  else live("asking", "paused");
}

$("login").addEventListener("submit", (event) => {
  event.preventDefault();
  const token = $("token").value.trim();
  $("token").value = "";
  if (!/^[\x21-\x7e]+$/.test(token)) return trouble("A token consists of printable characters without spaces.");
  sessionStorage.setItem(TOKEN, token);
  ask();
});
$("forget").addEventListener("click", () => {
  sessionStorage.removeItem(TOKEN);
  turn += 1;
  clearTimeout(timer);
  askForToken();
});
$("find").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("filter").value.trim();
  if (!text || !data) return;
  // A whole key is opened, listed or not; a part of one is, if only one key contains it.
  const found = matching();
  const all = data.keys.length === data.fleet.keys;
  if (data.keys.some((each) => each.key === text) || (!found.length && !all)) location.hash = linkTo(text);
  else if (found.length === 1) location.hash = linkTo(found[0].key);
  else if (found.length) hint(`${counted(found.length, "key")} contain this: choose one below, or enter the whole key.`);
});
$("filter").addEventListener("input", () => {
  hint("");
  if (data) showKeys();
});
addEventListener("hashchange", () => {
  $("filter").value = "";
  hint("");
  ask();
});
document.addEventListener("visibilitychange", () => (document.hidden ? again(0) : ask()));
// While the planner does not answer, ages stand still: the present state is unknown.
setInterval(() => data && !$("board").hasAttribute("data-old") && tick(), 1000);
ask();
