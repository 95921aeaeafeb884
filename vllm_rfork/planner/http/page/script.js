// The dashboard: fetches /dashboard.json every few seconds and shows it with the tables of columns.js.
const TOKEN = "rfork-token";
const ANSWER_MS = 10000;
const MAX_PAUSE_MS = 15000;

// --- the whole ---------------------------------------------------------------------------------------------------
function tile(id, value, sub, tone) {
  const parts = [element("b", "", value)];
  if (sub instanceof Element) parts.push(sub);
  else parts.push(element("span", tone, sub));
  $(id).replaceChildren(...parts);
}

function show() {
  const all = data.scope;
  const empty = !data.fleet.keys && !data.history.length && !data.failures.length && !chosenHash();
  $("about").textContent = plain(`${data.planner.version} · ${data.planner.store} store · ${data.planner.policy} · up with this state for ${time(data.age_s)}`);
  $("board").toggleAttribute("data-one", data.key !== null);
  $("board").toggleAttribute("data-empty", empty);
  showChosen(!!all);
  welcome(empty);
  // Zeros would look like a key that exists and has nothing.
  $("tiles").hidden = !all || empty || !!data.find;
  $("lists").hidden = !all && !data.history.length && !data.failures.length;
  if (all) showTiles(all);
  fastest = Math.max(...data.history.map((each) => (each.of_lease ? 0 : each.gb_per_s ?? 0)), 0.001);
  showKeys();
  for (const name of ["leases", "waiting", "seeds", "intents"]) {
    tables[name].fill(data[name], part(data[name].length, (data.found ?? all ?? {})[name] ?? 0, name));
  }
  // A search shows what it found, and nothing about what it did not.
  for (const name of ["leases", "waiting", "seeds", "intents", "history"]) $(name).hidden = !!data.find && !data[name].length;
  tables.history.fill(data.history, part(data.history.length, data.forks.count, "history"));
  showFailures();
  showFingerprints();
  showTree();
  const waiting = data.fleet.waiting ? `${count.format(data.fleet.waiting)} waiting · ` : "";
  document.title = `${waiting}RFork planner`;
  $("foot").textContent = "Complete data: vllm-rfork seeds, vllm-rfork leases, /debug/snapshot, /metrics.";
  const young = data.age_s < data.planner.stale_s;
  notice(!data.planner.ready ? "This planner is stopping: it accepts no new receivers."
    : young && !data.fleet.seeds ? "This planner has just started. Seeds return with their next heartbeat, within 30 seconds."
    : "");
}

function showChosen(known) {
  const model = data.view_model;
  $("chosen").hidden = data.key === null && !model;
  $("chosen-kind").textContent = model ? "Only the model" : "Only the key";
  $("chosen-key").textContent = plain(model ? [model.model, model.strategy].filter(Boolean).join(" · ") : data.key);
  $("unknown").hidden = known;
  $("unknown").textContent = `The planner does not know this ${model ? "model" : "key"}: no seed has announced it, and no receiver has asked for it.`;
}

function showTiles(all) {
  const forks = data.forks;
  tile("tile-seeds", count.format(all.seeds), troubles(all) || (all.seeds ? "all serving" : "none yet"), all.aside || all.absent ? "bad" : all.draining || all.seedless ? "warn" : "");
  const slots = all.slots ? `${counted(all.slots, "slot")}, ${Math.round((100 * all.leases) / all.slots)} % in use` : "no slots";
  tile("tile-leases", count.format(all.leases), data.leases.length ? ticking("span", received - data.leases[0].held_s, { before: `${slots}; longest for ` }) : slots);
  tile("tile-waiting", count.format(all.waiting), all.waiting ? ticking("span", received - all.oldest_wait_s, { before: "longest for ", className: "warn" }) : "nobody");
  tile("tile-intents", count.format(all.intents), all.intents ? "will be seeds soon" : "nobody");
  tile("tile-hits", hits(all) || "none", [`${count.format(all.forked)} forked, ${count.format(all.loaded)} loaded`, all.saved_s && `saved ${time(all.saved_s)}`].filter(Boolean).join(" · "));
  const lost = forks.failed + forks.expired;
  tile("tile-forks", forks.gb_per_s ? `${rate(forks.gb_per_s)} GB/s` : forks.count ? count.format(forks.count) : "none",
    forks.count ? `${count.format(forks.ok)} ok${lost ? `, ${count.format(lost)} failed` : ""}${forks.nbytes ? ` · ${bytes(forks.nbytes)}` : ""}` : "", lost ? "bad" : "");
}

// The planner's URL, and a text as one word of a shell's command line: others chose keys, and what follows a "?".
const base = () => (location.origin + location.pathname).replace(/\/$/, "");
const word = (text) => (/^[\w@%+=:,./-]+$/.test(text) ? text : `'${plain(text).replaceAll("'", "'\\''")}'`);

function welcome(empty) {
  $("welcome").hidden = !empty;
  $("welcome-lines").textContent = `pip install 'vllm-rfork[nixl]'\nexport RFORK_SCHEDULER_URL=${word(base())} MODEL_URL=MODEL MODEL_DEPLOY_STRATEGY_NAME=prod\nvllm serve MODEL --load-format rfork`;
  $("welcome-token").textContent = data.planner.takes_orders ? "Set RFORK_TOKEN to the token of this planner as well." : "";
}

function showFailures() {
  $("causes").hidden = !data.failures.length;
  $("kinds").replaceChildren(...data.causes.map((each) => element("span", "badge bad", `${each.cause} × ${count.format(each.count)}`)));
  tables.causes.fill(data.failures, part(data.failures.length, data.failures_kept, "history"));
}

function showFingerprints() {
  const shown = data.fingerprints;
  $("fingerprints").hidden = !shown.length;
  tables.fingerprints.fill(shown);
  const apart = shown.filter((each) => shown.some((other) => other !== each && other.key === each.key));
  const one = apart.find((each) => each.example);
  const command = one ? " To see all facts that differ, run this on a worker:" : "";
  $("apart").textContent = apart.length ? `Workers with different fingerprints are never paired.${command}` : "All workers have the same fingerprint.";
  $("command").hidden = !one;
  $("command").textContent = one ? `vllm-rfork explain --url ${word(base())} --key ${word(one.key)} --worker ${word(one.example.replace(/:[^:]*$/, ""))}` : "";
}

function showTree() {
  $("tree").hidden = data.tree.length < 2;
  const of = data.key === null && data.tree_key ? [element("li", "sub", `Of the key ${data.tree_key}; the other ranks are in the views of their keys.`)] : [];
  $("tree").querySelector("ul").replaceChildren(...of, ...data.tree.map(branch));
}

function branch(each) {
  const made = element("li", each.depth ? "branch" : "");
  made.style.paddingLeft = `${Math.min(each.depth, 12) * 1.1}rem`;
  if (each.more) {
    made.append(element("span", "sub", `and ${several(each.more, "one more", "more")}`));
    return made;
  }
  made.append(element("span", "mono", each.labels.pod ?? each.labels.host ?? each.seed));
  if (each.labels.pod ?? each.labels.host) made.append(element("span", "sub", each.seed));
  if (each.gone) made.append(element("span", "badge warn", "gone"));
  if (each.forks) made.append(element("span", "badge", `${each.forks} below`));
  return made;
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
  const ofModel = !!data.view_model;
  const title = ofModel ? "Keys" : "Models";
  const heading = $("keys").querySelector("h2");
  if (heading.textContent !== title) heading.replaceChildren(term(title));
  const rows = ofModel ? data.keys : data.models;
  const there = ofModel ? data.scope?.keys ?? 0 : data.found?.models ?? data.fleet.models;
  const cut = rows.length < there ? `${count.format(rows.length)} of ${counted(there, ofModel ? "key" : "model")} are listed, those with waiting receivers first. Enter a whole key above to open another one.` : "";
  tables.keys.fill(rows, cut, data.find ? "No model and no key contains this text." : data.fleet.keys ? "Nothing is known." : "There are no keys: no seed and no receiver has contacted this planner.");
}

function hint(text) {
  $("hint").hidden = !text;
  $("hint").textContent = text;
}

function notice(text) {
  $("notice").hidden = !text;
  if ($("notice").textContent !== text) $("notice").textContent = text;
}
