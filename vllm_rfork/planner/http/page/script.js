"use strict";
// The dashboard's script: asks the planner for /dashboard.json every few seconds and shows what it says.
// What the planner says is text that others chose: it reaches the page through textContent alone.
(() => {
  const TOKEN = "rfork-token";
  const ROWS = matchMedia("(max-width: 46rem)").matches ? 6 : 12; // of a list, until all are asked for
  const ANSWER_MS = 10000;
  const MAX_PAUSE_MS = 15000;
  const $ = (id) => document.getElementById(id);
  const count = new Intl.NumberFormat("en");
  const counted = (value, noun) => `${count.format(value)} ${noun}${value === 1 ? "" : "s"}`;
  const number = (value, digits) => value.toLocaleString("en", { maximumFractionDigits: digits });

  // --- text ------------------------------------------------------------------------------------------------------
  // Control characters, and those that turn the direction of writing, must not disguise what stands beside them.
  const plain = (text) => String(text ?? "").replace(/[\p{Cc}\p{Cf}\p{Zl}\p{Zp}]/gu, "�");
  const two = (value) => String(value).padStart(2, "0");

  function time(seconds, exact) {
    const left = Math.max(0, seconds);
    if (exact && left < 10) return left < 0.01 ? "< 0.01 s" : `${left.toFixed(2)} s`;
    const whole = Math.floor(left);
    if (whole < 60) return `${whole} s`;
    if (whole < 3600) return `${Math.floor(whole / 60)} m ${two(whole % 60)} s`;
    if (whole < 86400) return `${Math.floor(whole / 3600)} h ${two(Math.floor(whole / 60) % 60)} m`;
    return `${Math.floor(whole / 86400)} d ${Math.floor(whole / 3600) % 24} h`;
  }

  const rate = (value) => value.toLocaleString("en", value < 10 ? { minimumFractionDigits: 2, maximumFractionDigits: 2 } : { maximumFractionDigits: 1, minimumFractionDigits: 1 });

  function bytes(value) {
    const units = ["B", "kB", "MB", "GB", "TB", "PB"];
    let at = 0;
    while (value >= 1000 && at < units.length - 1) {
      value /= 1000;
      at += 1;
    }
    return `${number(value, value < 10 && at ? 2 : value < 100 && at ? 1 : 0)} ${units[at]}`;
  }

  function element(tag, className, text) {
    const made = document.createElement(tag);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = plain(text);
    return made;
  }

  // --- cells: { text, sub, badge, bar, age, until, link, mono, tone } ------------------------------------------------
  // Ages go on counting between two answers: an element with data-zero shows its distance from that moment.
  const clock = () => performance.now() / 1000;

  function tick(all) {
    const now = clock();
    for (const each of all ?? document.querySelectorAll("[data-zero]")) {
      const away = each.dataset.until ? each.dataset.zero - now : now - each.dataset.zero;
      each.textContent = (each.dataset.before ?? "") + time(away) + (each.dataset.after ?? "");
    }
  }

  function ticking(tag, zero, { until, before, after, className } = {}) {
    const made = element(tag, className);
    made.dataset.zero = zero;
    if (until) made.dataset.until = "1";
    if (before) made.dataset.before = before;
    if (after) made.dataset.after = after;
    tick([made]);
    return made;
  }

  function paint(td, cell) {
    const { zero, ...rest } = cell;
    const same = JSON.stringify(rest);
    if (td.painted === same) {
      if (zero !== undefined) td.querySelector("[data-zero]").dataset.zero = zero;
      return;
    }
    td.painted = same;
    td.replaceChildren();
    td.classList.remove("warn", "bad", "blank");
    if (cell.tone && !cell.badge) td.classList.add(cell.tone);
    if (zero === undefined && !cell.text && !cell.sub) td.classList.add("blank");
    const className = [cell.mono && "mono", cell.badge && "badge", cell.badge && cell.tone].filter(Boolean).join(" ");
    let main;
    if (zero !== undefined) {
      main = ticking("span", zero, { ...cell, className });
    } else {
      main = element(cell.link ? "a" : "span", className, cell.text);
      if (cell.link) main.href = cell.link;
    }
    if (cell.title) main.title = plain(cell.title);
    td.append(main);
    if (cell.bar !== undefined) {
      const bar = element("span", "bar");
      const fill = element("i");
      fill.style.width = `${Math.round(100 * Math.min(1, Math.max(0, cell.bar)))}%`;
      bar.append(fill);
      td.append(bar);
    }
    if (cell.sub) td.append(element("span", "sub", cell.sub));
  }

  // --- tables ------------------------------------------------------------------------------------------------------
  class Table {
    constructor(id, columns, nameOf, empty) {
      this.section = $(id);
      this.columns = columns;
      this.nameOf = nameOf;
      this.rows = new Map();
      this.open = false;
      this.table = element("table");
      const head = element("tr");
      for (const [label, className] of columns) {
        const th = element("th", className, label);
        th.scope = "col";
        head.append(th);
      }
      this.table.createTHead().append(head);
      this.body = this.table.createTBody();
      this.empty = element("p", "empty", empty);
      this.more = element("p", "more");
      this.button = element("button");
      this.button.type = "button";
      this.note = element("span");
      this.more.append(this.button, " ", this.note);
      this.button.addEventListener("click", () => {
        this.open = !this.open;
        this.fill(...this.last);
      });
      this.section.append(this.table, this.empty, this.more);
    }

    fill(entries, note, empty) {
      this.last = [entries, note, empty];
      const shown = this.open ? entries : entries.slice(0, ROWS);
      const rows = new Map();
      for (const entry of shown) {
        let name = this.nameOf(entry);
        while (rows.has(name)) name += "'";
        const row = this.rows.get(name) ?? this.newRow();
        rows.set(name, row);
        this.columns.forEach(([, , cell], at) => paint(row.cells[at], cell(entry)));
      }
      for (const [name, row] of this.rows) if (!rows.has(name)) row.remove();
      let at = 0;
      for (const row of rows.values()) {
        if (this.body.rows[at] !== row) this.body.insertBefore(row, this.body.rows[at] ?? null);
        at += 1;
      }
      this.rows = rows;
      this.table.hidden = !entries.length;
      this.empty.hidden = !!entries.length;
      if (empty) this.empty.textContent = empty;
      this.button.hidden = entries.length <= ROWS;
      this.button.textContent = this.open ? "Show less" : `Show ${entries.length - ROWS} more`;
      this.note.textContent = note ?? "";
      this.more.hidden = this.button.hidden && !note;
    }

    newRow() {
      const row = element("tr");
      for (const [label, className] of this.columns) {
        const td = element("td", className);
        td.dataset.label = label;
        row.append(td);
      }
      return row;
    }
  }

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
    if (seed.held_s > 0) return till(seed.held_s, { before: "held for ", badge: true, tone: "warn", sub: "known to an earlier state" });
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
    ], (each) => `${each.lease} ${each.seed} ${each.receiver}`, "Nobody forks at the moment."),
    waiting: new Table("waiting", [
      ["Place", "nowrap", (each) => ({ text: `${each.place} of ${lengthOf(each.key)}` })],
      ["Receiver", "nowrap", (each) => mono(each.receiver)],
      ["Waits", "num", (each) => since(each.waited_s)],
      ["At most", "num", (each) => ({ text: time(each.wait_s) })],
      ["Key", "key", (each) => keyCell(each.key)],
    ], (each) => `${each.key}\n${each.place}`, "Nobody waits for a seed."),
    seeds: new Table("seeds", [
      ["Seed", "nowrap", (each) => ({ text: each.seed, mono: true, sub: labelsOf(each) })],
      ["State", "nowrap", stateOf],
      ["Leases", "num", (each) => ({ text: `${each.leases} / ${each.slots}`, bar: each.leases / each.slots })],
      ["Heard of", "num", (each) => since(each.seen_s_ago, { after: " ago", tone: each.seen_s_ago > data.planner.stale_s * 0.75 ? "warn" : undefined })],
      ["Seed for", "num", (each) => since(each.age_s)],
      ["Key", "key", (each) => keyCell(each.key)],
    ], (each) => each.seed, "There are no seeds. A worker appears here when it has loaded its weights and announces itself."),
    history: new Table("history", [
      ["Ended", "num", (each) => since(each.ago_s, { after: " ago" })],
      ["Result", "nowrap", (each) => ({ text: RESULTS[each.result]?.[0] ?? each.result, badge: true, tone: RESULTS[each.result]?.[1], sub: [each.cause, each.side && `side: ${each.side}`].filter(Boolean).join(", ") })],
      ["Receiver", "nowrap", (each) => mono(each.receiver)],
      ["From seed", "nowrap", (each) => mono(each.seed)],
      ["Bytes", "num", (each) => ({ text: each.nbytes ? bytes(each.nbytes) : "", sub: each.nbytes ? each.lane : "" })],
      // If the receiver reported no time it is that of the lease, which is longer than the fork.
      ["Time", "num", (each) => ({ text: time(each.duration_s, true), sub: each.of_lease ? "of the lease" : "" })],
      ["GB/s", "num", (each) => (!each.gb_per_s ? { text: "" } : each.of_lease ? { text: `≥ ${rate(each.gb_per_s)}` } : { text: rate(each.gb_per_s), bar: each.gb_per_s / fastest })],
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
})();
