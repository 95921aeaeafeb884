// The columns of every table: an entry of the data in, a cell out.
let received = 0; // when the present data came, on our clock
let data = null;
let fastest = 1;
const since = (age, more) => ({ zero: received - age, ...more });
const till = (left, more) => ({ zero: received + left, until: true, ...more });
const mono = (text) => ({ text, mono: true });
const keyCell = (key) => ({ text: key || "(not known yet)", title: key, mono: true, link: key ? linkTo(key) : undefined });
const several = (count, one, more) => (count === 1 ? one : `${number(count, 0)} ${more}`);

// A worker by the name that people know: its pod, else its host, else its address.
function workerCell(each) {
  const names = [each.pod, each.host, each.address ?? each.receiver, each.intent].filter(Boolean);
  return { text: names[0] ?? "unknown", mono: true, sub: [...new Set(names)].slice(1).join(" · ") };
}

function modelCell(each) {
  if (!each.model) return { ...keyCell(each.key), sub: "" };
  if (data.view_model) return keyCell(each.key);
  return { text: each.model, title: each.model, link: linkToModel(each), sub: `${each.strategy || "no strategy"} · ${several(each.keys, "1 rank", "ranks")}` };
}

function troubles(each) {
  const words = [];
  if (each.aside) words.push(`${count.format(each.aside)} quarantined`);
  if (each.absent) words.push(`${count.format(each.absent)} absent`);
  if (each.draining) words.push(`${count.format(each.draining)} draining`);
  if (each.seedless && each.seeds) words.push(several(each.seedless, "one rank without a seed", "ranks without a seed"));
  return words.join(", ");
}

function hits(each) {
  const starts = each.forked + each.loaded;
  return starts ? `${Math.round((100 * each.forked) / starts)} %` : "";
}

const hitCell = (each) => ({ text: hits(each), bar: hits(each) ? each.forked / (each.forked + each.loaded) : undefined });

function stateOf(seed) {
  if (seed.absent) return { text: "absent", badge: true, tone: "bad", sub: "its presence connection broke" };
  if (seed.draining) {
    const by = seed.drained ? "by an operator" : "withdrawn by its worker";
    return { text: seed.leases ? "draining" : "drained", badge: true, tone: "warn", sub: by };
  }
  if (seed.aside_s > 0) return till(seed.aside_s, { before: "quarantined for ", badge: true, tone: "bad", sub: seed.causes, title: seed.causes });
  if (seed.held_s > 0) return till(seed.held_s, { before: "not granted for ", badge: true, tone: "warn", sub: "known to an earlier state" });
  const sub = seed.failures ? `failed for ${counted(seed.failures, "receiver")} in a row` : "";
  if (seed.leases >= seed.slots) return { text: "busy", badge: true, sub };
  return { text: "free", badge: true, tone: "good", sub };
}

function actionsOf(seed) {
  if (!data.planner.takes_orders) return { text: "" };
  const acts = [];
  if (seed.aside_s > 0) acts.push(["Lift", () => order("rfork_lift", seed)]);
  if (seed.drained) acts.push(["Undo drain", () => order("rfork_drain", seed, { "RFORK-UNDO": "1" })]);
  else if (!seed.draining) acts.push(["Drain", () => order("rfork_drain", seed)]);
  return { acts, of: seed.key };
}

const REASONS = { busy: "a free slot", loading: "a load from storage", restarted: "the hold after a restart" };

function awaited(each) {
  const cell = { text: REASONS[each.reason] ?? (each.reason || "a seed") };
  if (each.reason === "loading" && each.loading_s !== null) {
    cell.sub = each.load_s ? `${Math.min(99, Math.round((100 * each.loading_s) / each.load_s))} % of about ${time(each.load_s)}` : `for ${time(each.loading_s)} so far; no load was measured yet`;
  } else if (each.reason === "busy") {
    cell.sub = each.hold_s ? `a fork holds one for ${time(each.hold_s, true)}` : "no fork was measured yet";
  }
  return cell;
}

const progress = (done, left) => (left === null || left === undefined ? undefined : done / Math.max(done + left, 0.1));
const expected = (left) => (left === null || left === undefined ? { text: "" } : left < 1 ? { text: "soon" } : till(left));
const lengthOf = (key) => count.format(data.keys.find((each) => each.key === key)?.waiting ?? 0);
const labelsOf = (seed) => Object.entries(seed.labels).map(([name, value]) => `${name}=${value}`).join(" ");

// Reported once the receiver is a seed itself.
function cachesOf(caches) {
  if (!caches) return { text: "" };
  const missed = Object.entries(caches.misses).map(([kind, reason]) => (reason ? `${kind} (${reason})` : kind));
  const text = [caches.hits.length && counted(caches.hits.length, "hit"), missed.length && `${count.format(missed.length)} missed`].filter(Boolean).join(", ");
  const title = [caches.hits.length && `Used: ${caches.hits.join(", ")}.`, missed.length && `Missed: ${missed.join(", ")}.`].filter(Boolean).join(" ");
  return { text, sub: caches.saved_s ? `saved ${time(caches.saved_s)}` : "", title };
}

const pastReceiver = (each) => (each.pod ? { text: each.pod, mono: true, sub: each.receiver } : mono(each.receiver));
const pastName = (each) => `${each.receiver} ${each.seed} ${each.result} ${each.duration_s} ${each.nbytes} ${each.cause}`;
const RESULTS = { ok: ["ok", "good"], failed: ["failed", "bad"], expired: ["expired", "bad"], released: ["released", ""] };
const tables = {
  causes: new Table("causes", [
    ["Ended", "num", (each) => since(each.ago_s, { after: " ago" })],
    ["Cause", "nowrap", (each) => ({ text: each.cause || each.result, badge: true, tone: "bad", sub: each.side ? `side: ${each.side}` : "" })],
    ["Receiver", "who", pastReceiver],
    ["From seed", "nowrap", (each) => mono(each.seed)],
    ["Lane", "nowrap", (each) => mono(each.lane)],
    ["Key", "key", (each) => keyCell(each.key)],
  ], pastName, "No fork failed.", 4),
  keys: new Table("keys", [
    ["Model", "key", modelCell],
    ["Seeds", "num", (each) => ({ text: count.format(each.seeds), sub: troubles(each) })],
    ["Slots in use", "num", (each) => ({ text: `${count.format(each.leases)} / ${count.format(each.slots)}`, bar: each.slots ? each.leases / each.slots : 0 })],
    ["Waiting", "num", (each) => (each.waiting ? { text: count.format(each.waiting), tone: "warn" } : { text: "0" })],
    ["Oldest wait", "num", (each) => (each.waiting ? since(each.oldest_wait_s, { tone: "warn" }) : { text: "" })],
    ["Loading", "num", (each) => ({ text: count.format(each.intents) })],
    ["Hit rate", "num", hitCell],
    ["Saved", "num", (each) => ({ text: each.saved_s ? time(each.saved_s) : "" })],
  ], (each) => each.key || `${each.model}\n${each.strategy}`),
  fingerprints: new Table("fingerprints", [
    ["Fingerprint", "print", (each) => ({ text: each.fingerprint || "(none stated)", title: each.fingerprint, mono: true })],
    ["Seeds", "num", (each) => ({ text: count.format(each.seeds) })],
    ["Waiting", "num", (each) => ({ text: count.format(each.waiting) })],
    ["Loading", "num", (each) => ({ text: count.format(each.intents) })],
    ["One of them", "nowrap", (each) => mono(each.example)],
    ["Differs", "differs", (each) => ({ text: each.differs || (each.fingerprint ? "" : "These workers state none, and may be paired with any.") })],
    ["Key", "key", (each) => keyCell(each.key)],
  ], (each) => `${each.key}\n${each.fingerprint}`, "", 6),
  leases: new Table("leases", [
    ["Receiver", "who", workerCell],
    ["From seed", "nowrap", (each) => mono(each.seed)],
    ["Since", "num", (each) => since(each.held_s, { bar: each.expected_s ? each.held_s / each.expected_s : undefined })],
    ["Lease ends in", "num", (each) => till(each.expires_in_s, { tone: each.expires_in_s < 5 ? "warn" : undefined })],
    ["Key", "key", (each) => keyCell(each.key)],
  ], (each) => `${each.lease} ${each.seed} ${each.receiver}`, "No receiver forks at the moment."),
  waiting: new Table("waiting", [
    ["Place", "nowrap", (each) => ({ text: `${each.place} of ${lengthOf(each.key)}` })],
    ["Receiver", "who", workerCell],
    ["Waits for", "", awaited],
    ["Waits", "num", (each) => since(each.waited_s, { bar: progress(each.waited_s, each.expected_s) })],
    ["Expected in", "num", (each) => expected(each.expected_s)],
    ["At most", "num", (each) => ({ text: time(each.wait_s) })],
    ["Key", "key", (each) => keyCell(each.key)],
  ], (each) => `${each.key}\n${each.place}`, "No receiver waits for a seed."),
  seeds: new Table("seeds", [
    ["Seed", "seed", (each) => ({ text: each.seed, mono: true, sub: labelsOf(each) })],
    ["State", "", stateOf],
    ["Leases", "num", (each) => ({ text: `${each.leases} / ${each.slots}`, bar: each.leases / each.slots })],
    ["Last seen", "num", (each) => since(each.seen_s_ago, { after: " ago", tone: each.seen_s_ago > data.planner.stale_s * 0.75 ? "warn" : undefined, sub: `seed for ${time(each.age_s)}` })],
    ["Forked from", "nowrap", (each) => mono(each.parent)],
    ["Fingerprint", "nowrap", (each) => ({ text: each.fingerprint.slice(0, 8), title: each.fingerprint, mono: true })],
    ["Key", "key", (each) => keyCell(each.key)],
    ["Action", "nowrap", actionsOf],
  ], (each) => each.seed, "There are no seeds. A worker appears here when it has loaded its weights and announces itself."),
  history: new Table("history", [
    ["Ended", "num", (each) => since(each.ago_s, { after: " ago" })],
    ["Result", "nowrap", (each) => ({ text: RESULTS[each.result]?.[0] ?? each.result, badge: true, tone: RESULTS[each.result]?.[1], sub: [each.cause, each.side && `side: ${each.side}`].filter(Boolean).join(", ") })],
    ["Receiver", "who", pastReceiver],
    ["From seed", "nowrap", (each) => mono(each.seed)],
    ["Lane", "nowrap", (each) => mono(each.lane)],
    ["Bytes", "num", (each) => ({ text: each.nbytes ? bytes(each.nbytes) : "" })],
    // If the receiver reported no time it is that of the lease, which is longer than the fork.
    ["Time", "num", (each) => ({ text: time(each.duration_s, true), sub: each.of_lease ? "of the lease" : "" })],
    ["GB/s", "num", (each) => (!each.gb_per_s ? { text: "" } : each.of_lease ? { text: `≥ ${rate(each.gb_per_s)}` } : { text: rate(each.gb_per_s), bar: each.gb_per_s / fastest })],
    ["Caches", "nowrap", (each) => cachesOf(each.caches)],
    ["Key", "key", (each) => keyCell(each.key)],
  ], pastName, "No fork has ended yet."),
  intents: new Table("intents", [
    ["Worker", "who", workerCell],
    ["Since", "num", (each) => since(each.since_s, { bar: each.expected_s ? each.since_s / each.expected_s : undefined })],
    ["Expected in", "num", (each) => (each.expected_s ? expected(each.expected_s - each.since_s) : { text: "" })],
    ["Key", "key", (each) => keyCell(each.key)],
  ], (each) => `${each.key}\n${each.intent}`, "No worker loads from storage."),
};
