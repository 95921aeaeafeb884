// Requests to the planner: the data, every few seconds, and the orders of operators.
let turn = 0; // answers to earlier requests are not shown
let timer = 0;
let failures = 0;
let refusedToken = false;

const linkTo = (key) => `#key=${encodeURIComponent(key)}`;
const linkToModel = (each) => `#model=${encodeURIComponent(each.model)}&strategy=${encodeURIComponent(each.strategy)}`;
const chosenHash = () => location.hash.length > 1;

// The part of the fleet that the address names: { key }, { model, strategy }, or nothing.
function chosen() {
  const parts = {};
  try {
    for (const each of location.hash.slice(1).split("&")) parts[each.split("=")[0]] = decodeURIComponent(each.slice(each.indexOf("=") + 1));
  } catch {
    return {};
  }
  return parts;
}

const sendable = (text) => (/^(?!UTF-8'')[\x21-\x7e]([\x20-\x7e]*[\x21-\x7e])?$/.test(text) ? text : `UTF-8''${encodeURIComponent(text)}`);

function headers(key) {
  const sent = { Accept: "application/json" };
  if (key) sent.SEED_KEY = sendable(key);
  const token = sessionStorage.getItem(TOKEN);
  if (token) sent.Authorization = `Bearer ${token}`;
  return sent;
}

function address() {
  const { model, strategy } = chosen();
  const query = new URLSearchParams();
  if (model) {
    query.set("model", model);
    query.set("strategy", strategy ?? "");
  }
  const find = $("filter").value.trim().slice(0, 200);
  if (find) query.set("find", find);
  return query.size ? `dashboard.json?${query}` : "dashboard.json";
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
    answer = await fetch(address(), { headers: headers(chosen().key), cache: "no-store", redirect: "error", signal: AbortSignal.timeout(ANSWER_MS) });
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

// Drain a seed, undo that, or lift a quarantine; the next data shows the result.
async function order(path, seed, more = {}) {
  const named = { SEED_IP: seed.ip, SEED_PORT: String(seed.port), SEED_RANK: String(seed.rank) };
  try {
    const answer = await fetch(path, { method: "POST", headers: { ...headers(seed.key), ...named, ...more }, redirect: "error", signal: AbortSignal.timeout(ANSWER_MS) });
    if (answer.status === 401) return askForToken();
    hint(answer.ok ? "" : `The planner refused: ${plain((await answer.text()).slice(0, 300).trim())}.`);
  } catch {
    hint("The planner did not answer: the order may have arrived.");
  }
  await ask();
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
  for (const each of document.querySelectorAll("#tiles dd, #about, #kinds, #apart, #command, #tree ul, #chosen-key")) each.replaceChildren();
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
$("copy").addEventListener("click", () => navigator.clipboard?.writeText($("welcome-lines").textContent));
$("find").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("filter").value.trim();
  if (!text || !data) return;
  // A whole key is opened, listed or not; a part of one is, if only one key contains it.
  const found = matching();
  const all = data.keys.length === (data.found?.keys ?? data.fleet.keys);
  const searched = data.find === text; // what is listed contains the text somewhere, if not in the key
  if (data.keys.some((each) => each.key === text) || (!found.length && !all && !searched)) location.hash = linkTo(text);
  else if (found.length === 1) location.hash = linkTo(found[0].key);
  else if (found.length) hint(`${counted(found.length, "key")} contain this: choose one below, or enter the whole key.`);
});
$("filter").addEventListener("input", () => {
  hint("");
  clearTimeout(timer);
  timer = setTimeout(ask, 250);
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
