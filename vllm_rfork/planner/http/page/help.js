// Help for each term: a press on an underlined word shows its meaning, and the footer has all of them in one list.
const HELP = {
  Seeds: "Worker ranks that hold final weights and let others read them.",
  Seed: "A worker rank that holds final weights and lets others read them: address, port and rank of its service. Below it, its labels.",
  Receiver: "A worker rank that is starting and reads its weights from a seed. Its pod or host comes from its labels.",
  Worker: "A worker that loads from storage and will be a seed. Others of its key wait for it, if that is expected to be faster.",
  "Forking now": "Receivers that read from a seed at the moment. Each holds one lease.",
  "Loading from storage": "Workers that were sent to storage, because no seed of their key was free, and that will be seeds.",
  Waiting: "Receivers in the queue of their key. They wait as long as that is expected to be faster than reading storage.",
  Queue: "Receivers that wait for a seed, in the order in which they are served.",
  "Hit rate": "Share of starts whose weights came from a seed instead of storage. Saved: the measured load from storage minus the fork, added up.",
  Saved: "For each fork, the measured load from storage of its key minus the fork's own time, added up.",
  "Last forks, median": "Median rate of the last forks whose receivers reported their time.",
  "Last forks": "Leases that have ended, the youngest first, with what their receivers reported.",
  Failures: "Forks that failed or whose lease expired. They are kept longer than forks that succeeded.",
  Models: "All keys with the same model and strategy, as their workers name them; ranks are counted together. A key of older workers, which send no names, is listed by itself.",
  Model: "Model and strategy as the workers name them. Press it to see its keys, one for each rank.",
  Keys: "The seed keys of this model. Workers with equal keys may be paired.",
  Key: "The seed key: workers with equal keys may be paired. Each rank has its own.",
  "Slots in use": "Leases now, and how many the seeds accept at once.",
  "Oldest wait": "How long the receiver that has waited longest has been waiting.",
  Loading: "Workers that load these weights from storage and will be seeds.",
  Since: "How long the receiver has had its lease. The bar compares that with the mean of its key.",
  "Lease ends in": "The lease ends then, unless the receiver renews it. Receivers renew at a third of the time.",
  "From seed": "The seed that the receiver reads from.",
  Place: "Place in the queue of the key.",
  "Waits for": "What the receiver waits for: a free slot of a busy seed, a worker that loads from storage, or the end of the hold after a restart of the planner.",
  Waits: "How long the receiver has waited. The bar shows the part of the whole wait that is expected.",
  "Expected in": "Estimate from the measured forks and loads of this key. Empty: nothing was measured yet.",
  "At most": "The longest wait: then the receiver loads from storage.",
  State: "free: can be granted. busy: all slots are leased. absent: its process is presumed dead. quarantined: forks of several receivers failed. draining: gets no new lease.",
  Leases: "Receivers that read from the seed, and how many it accepts at once.",
  "Forked from": "The seed that this one's weights came from. Empty: they came from storage, or the worker is an older one.",
  "Last seen": "Time since the last heartbeat. A seed that is silent for a minute is dropped.",
  Fingerprint: "Digest of everything that shapes the bytes: versions, dtype, quantization, sizes. Only workers with equal fingerprints are paired.",
  Fingerprints: "Workers of one key with different fingerprints are never paired: their bytes may differ.",
  Differs: "The facts in which workers with this fingerprint differ from others of the key, as one of them reported.",
  "One of them": "A seed with this fingerprint. vllm-rfork explain compares its facts with those of another worker.",
  Action: "Drain: no receiver is sent to the seed any more, and its leases stay. Lift: end a quarantine now. Both need a planner with a token.",
  "Fork tree": "Each seed below the one that its weights were forked from. The root loaded from storage.",
  Ended: "Time since the lease ended.",
  Result: "ok and failed are reported by the receiver. expired: the lease was not renewed. released: nothing was reported.",
  Cause: "Class of the error that ended the fork, and whose failure it was as far as the receiver knows.",
  Lane: "Transfer engine, and the path of the bytes.",
  Bytes: "Bytes that the receiver reported.",
  Time: "Duration of the fork by the receiver's own clock. If it reported none: how long it held the lease, which is longer.",
  "GB/s": "Bytes divided by seconds. The bar compares it with the fastest fork in the list.",
  Caches: "Start-up caches of the seed that the start used or missed. Reported once the receiver is a seed itself.",
};

// The word is a button, so that it works by keyboard and on a phone.
function term(word) {
  const made = element("button", "term", word);
  made.type = "button";
  made.addEventListener("click", () => explain(made, word));
  return made;
}

function explain(at, word) {
  const help = $("help");
  help.textContent = HELP[word];
  help.showPopover();
  const place = at.getBoundingClientRect();
  const left = Math.min(place.left, document.documentElement.clientWidth - help.offsetWidth - 8);
  help.style.left = `${Math.max(8, left)}px`;
  const below = place.bottom + 6;
  help.style.top = `${below + help.offsetHeight < innerHeight ? below : Math.max(8, place.top - help.offsetHeight - 6)}px`;
}

for (const each of document.querySelectorAll("section > h2, #tiles dt")) {
  if (each.textContent in HELP) each.replaceChildren(term(each.textContent));
}
$("terms").addEventListener("click", () => {
  const list = $("glossary").querySelector("dl");
  if (!list.children.length) {
    for (const word of Object.keys(HELP).sort((a, b) => a.localeCompare(b))) list.append(element("dt", "", word), element("dd", "", HELP[word]));
  }
  $("glossary").showModal();
});
