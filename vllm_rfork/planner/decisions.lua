-- Every decision of the planner over Redis: memory_store.py, ledger.py and fleet.py in Redis's words. views.lua, which
-- follows it in one script, has what people look at, and runs the operation.
--
-- KEYS[1]  any key of the fleet, "{prefix}:meta"; all others share its hash tag and thus its cluster slot
-- ARGV[1]  the operation        ARGV[2]  the rules (JSON)        ARGV[3]  the operation's arguments (JSON)
-- Answers JSON: {"r": result, "ev": [[kind, key, seed, detail], ...]}; "r" is {"error": name, "text": ...} where
-- the operation was declined. Keys, fingerprints and ids arrive encoded as printable ASCII, so that the unit
-- separator below never occurs in them.
--
-- Redis runs one script at a time and all of it: that is the atomicity of every decision. Time is Redis's own
-- unless the arguments carry "now" (tests). Redis 5 or later.

local SEP = "\31"
local P = string.match(KEYS[1], "^(.*:)meta$")
local rules = cjson.decode(ARGV[2])
local args = cjson.decode(ARGV[3])
local TURNS = 1099511627776
local MAX_WEIGHT = 8191
local DUE_AT_ONCE = 500

local call = redis.call
-- bereft: keys that lost a seed or an intent, so that somebody may wait for nothing; left: keys that lost a waiter
local events, bereft, left, nonces = {}, {}, {}, 0
local now, meta

-- ---- small things ---------------------------------------------------------------------------------------------
local function fixed(seconds) return string.format("%.6f", seconds) end
local function whole(number) return string.format("%.0f", number) end
local function observe(kind, key, seed, detail) events[#events + 1] = {kind, key or "", seed or "", detail or ""} end

local function hash(key)
  local flat = call("HGETALL", key)
  if #flat == 0 then return nil end
  local fields = {}
  for i = 1, #flat, 2 do fields[flat[i]] = flat[i + 1] end
  return fields
end

local function serial() return call("HINCRBY", P .. "meta", "serial", 1) end
local function count(what, change) return call("HINCRBY", P .. "meta", what, change) end
local function counted(what) return tonumber(call("HGET", P .. "meta", what) or "0") end
local function due(kind, name, other, at) call("ZADD", P .. "due", fixed(at), kind .. SEP .. name .. SEP .. other) end
local function undue(kind, name, other) call("ZREM", P .. "due", kind .. SEP .. name .. SEP .. other) end
local function is_due(kind, name, other) return call("ZSCORE", P .. "due", kind .. SEP .. name .. SEP .. other) end

local function lease_id()
  nonces = nonces + 1
  local random = redis.sha1hex(args.nonce .. ":" .. nonces .. ":" .. serial())
  return rules.lease_id .. meta.state .. "." .. string.sub(random, 1, 24)
end

-- ---- keys -----------------------------------------------------------------------------------------------------
local function has_room_for(key)
  return call("SISMEMBER", P .. "keys", key) == 1 or call("SCARD", P .. "keys") < rules.max_keys
end

local function shelf_is_empty(key)
  return call("EXISTS", P .. "ks:" .. key, P .. "lines:" .. key, P .. "int:" .. key) == 0
end

-- the pools and serving sets that a receiver may look into, and those in which a seed sits
local function classes_for(fp) if fp == "" then return {"*"} end return {"=" .. fp, "="} end
local function classes_of(seed) return {"=" .. seed.fp, "*"} end
local function pool_key(key, class, bucket) return P .. "pool:" .. key .. SEP .. class .. SEP .. bucket end
local function serving_key(key, class) return P .. "srv:" .. key .. SEP .. class end

-- ---- seeds ----------------------------------------------------------------------------------------------------
local function read_seed(name)
  local seed = hash(P .. "seed:" .. name)
  if not seed then return nil end
  seed.name = name
  for _, field in ipairs({"slots", "leases", "turn", "failures", "aside", "held", "seen", "first"}) do
    seed[field] = tonumber(seed[field])
  end
  seed.draining = seed.draining == "1"
  return seed
end

local function is_serving(seed) return not seed.draining and now >= seed.aside end
local function is_stale(seed) return now >= seed.seen + rules.stale_s end
local function is_open(seed)
  return is_serving(seed) and not is_stale(seed) and now >= seed.held and seed.leases < seed.slots
end

local function score(seed)
  local weight = 0
  if rules.weigh == "load" then
    weight = math.floor(seed.leases * 1000 / math.max(seed.slots, 1))
  elseif rules.weigh == "nic" then
    weight = tonumber(call("HGET", P .. "nicn", seed.nic) or "0")
  end
  return whole(math.min(weight, MAX_WEIGHT) * TURNS + seed.turn % TURNS)
end

local function rank_one(seed)
  local serving, open = is_serving(seed), is_open(seed)
  local weight = open and score(seed)
  for _, class in ipairs(classes_of(seed)) do
    call(serving and "SADD" or "SREM", serving_key(seed.key, class), seed.name)
    for _, bucket in ipairs(cjson.decode(seed.buckets)) do
      if open then
        call("ZADD", pool_key(seed.key, class, bucket), weight, seed.name)
      else
        call("ZREM", pool_key(seed.key, class, bucket), seed.name)
      end
    end
  end
  call(seed.draining and "SADD" or "SREM", P .. "drain:" .. seed.key, seed.name)
  call(now < seed.aside and "SADD" or "SREM", P .. "aside:" .. seed.key, seed.name)
end

local function rank_nic(nic)
  for _, name in ipairs(call("SMEMBERS", P .. "nic:" .. nic)) do rank_one(read_seed(name)) end
end

-- bring every index to the seed's present state
local function rank(seed)
  if rules.weigh == "nic" then rank_nic(seed.nic) else rank_one(seed) end
end

local function write(seed, ...)
  local fields = {}
  for _, field in ipairs({...}) do
    local value = seed[field]
    if value == true then value = "1" elseif value == false then value = "0" end
    if type(value) == "number" then
      value = (field == "aside" or field == "held" or field == "seen" or field == "first") and fixed(value) or whole(value)
    end
    fields[#fields + 1] = field
    fields[#fields + 1] = value
  end
  call("HSET", P .. "seed:" .. seed.name, unpack(fields))
end

local function count_lease(seed, change)
  seed.leases = seed.leases + change
  call("HINCRBY", P .. "seed:" .. seed.name, "leases", change)
  call("HINCRBY", P .. "k:" .. seed.key, "leases", change)
  call("HINCRBY", P .. "nicn", seed.nic, change)
end

local function leave_nic(seed)
  call("SREM", P .. "nic:" .. seed.nic, seed.name)
  local left = call("HINCRBY", P .. "nicn", seed.nic, 0 - seed.leases)
  if call("EXISTS", P .. "nic:" .. seed.nic) == 0 then
    call("HDEL", P .. "nicn", seed.nic)
  elseif rules.weigh == "nic" then
    rank_nic(seed.nic)
  end
  return left
end

local function forget(seed)
  for _, class in ipairs(classes_of(seed)) do
    call("SREM", serving_key(seed.key, class), seed.name)
    for _, bucket in ipairs(cjson.decode(seed.buckets)) do call("ZREM", pool_key(seed.key, class, bucket), seed.name) end
  end
  call("SREM", P .. "drain:" .. seed.key, seed.name)
  call("SREM", P .. "aside:" .. seed.key, seed.name)
  call("SREM", P .. "ks:" .. seed.key, seed.name)
  call("HINCRBY", P .. "k:" .. seed.key, "slots", 0 - seed.slots)
end

-- ---- leases, waiters, intents -----------------------------------------------------------------------------------
local function unlink_lease(id, name, key)
  call("DEL", P .. "lease:" .. id)
  if key ~= "" then call("ZREM", P .. "held:" .. key, id) end
  call("SREM", P .. "of:" .. name, id)
  undue("lease", id, "")
  count("leases", -1)
end

local function add_lease(id, name, key, receiver, ttl, ticket)
  call("HSET", P .. "lease:" .. id, "name", name, "key", key, "receiver", receiver, "at", fixed(now), "ticket", ticket)
  call("SADD", P .. "of:" .. name, id)
  if key ~= "" then call("ZADD", P .. "held:" .. key, fixed(now), id) end
  due("lease", id, "", now + ttl)
  count("leases", 1)
end

local function unqueue(key, fp, ticket)
  call("ZREM", P .. "line:" .. key .. SEP .. fp, ticket)
  call("HINCRBY", P .. "k:" .. key, "waiting", -1)
  if call("EXISTS", P .. "line:" .. key .. SEP .. fp) == 0 then call("SREM", P .. "lines:" .. key, fp) end
end

local function forget_ticket(ticket)
  if ticket == "" then return end
  local waiter = hash(P .. "w:" .. ticket)
  if not waiter then return end
  call("DEL", P .. "w:" .. ticket)
  undue("waiter", ticket, "")
  count("waiters", -1)
  if waiter.result == "" then unqueue(waiter.key, waiter.fp, ticket) end
  left[waiter.key] = true
end

local function drop_intent(key, intent)
  if intent == "" then return false end
  local fp = call("HGET", P .. "int:" .. key, intent)
  if not fp then return false end
  call("HDEL", P .. "int:" .. key, intent)
  if call("HINCRBY", P .. "intn:" .. key, fp, -1) <= 0 then call("HDEL", P .. "intn:" .. key, fp) end
  count("intents", -1)
  undue("intent", key, intent)
  bereft[key] = true
  return true
end

local function add_intent(key, intent, fp, ttl)
  if is_due("intent", key, intent) then
    if call("HGET", P .. "int:" .. key, intent) == fp then
      due("intent", key, intent, now + ttl)
      return true
    end
    drop_intent(key, intent)
  elseif counted("intents") >= rules.max_intents or not has_room_for(key) then
    return false
  end
  call("SADD", P .. "keys", key)
  call("HSET", P .. "int:" .. key, intent, fp)
  call("HINCRBY", P .. "intn:" .. key, fp, 1)
  count("intents", 1)
  due("intent", key, intent, now + ttl)
  return true
end

local function miss(ask)
  return {missed = true, intent = ask.intent ~= "" and add_intent(ask.key, ask.intent, ask.fp, rules.intent_ttl_s)}
end

local function is_excluded(ask, name)
  for _, each in ipairs(ask.exclude) do if each == name then return true end end
  return false
end

-- somebody that the receiver may fork from is serving, or loads from storage
local function has_hope(ask)
  for _, class in ipairs(classes_for(ask.fp)) do
    local names = serving_key(ask.key, class)
    local serving = call("SCARD", names)
    if serving > #ask.exclude then return true end
    if serving > 0 then
      for _, name in ipairs(call("SMEMBERS", names)) do if not is_excluded(ask, name) then return true end end
    end
  end
  local suits
  if ask.fp == "" then
    suits = call("HLEN", P .. "int:" .. ask.key)
  else
    suits = tonumber(call("HGET", P .. "intn:" .. ask.key, ask.fp) or "0")
      + tonumber(call("HGET", P .. "intn:" .. ask.key, "") or "0")
  end
  local own = ask.intent ~= "" and call("HGET", P .. "int:" .. ask.key, ask.intent)
  if own and (ask.fp == "" or own == ask.fp or own == "") then suits = suits - 1 end
  return suits > 0
end

local function read_waiter(ticket)
  local waiter = hash(P .. "w:" .. ticket)
  if waiter then
    waiter.ticket = ticket
    waiter.exclude = cjson.decode(waiter.exclude)
  end
  return waiter
end

-- tickets of a key in order, of every fingerprint that a seed with `fp` suits ("": all); the first `most` or all
local function tickets(key, fp, most)
  local prints = fp ~= "" and {fp, ""} or call("SMEMBERS", P .. "lines:" .. key)
  local all = {}
  for _, print in ipairs(prints) do
    local flat = call("ZRANGE", P .. "line:" .. key .. SEP .. print, 0, (most or 0) - 1, "WITHSCORES")
    for i = 1, #flat, 2 do all[#all + 1] = {flat[i], tonumber(flat[i + 1])} end
  end
  if #prints > 1 then table.sort(all, function(a, b) return a[2] < b[2] end) end
  return all
end

local function is_alive(replica) return tonumber(call("ZSCORE", P .. "replicas", replica) or "0") > now end

-- the first waiter of the line that the seed suits; who waits at a dead replica is forgotten on the way
local function first_for(seed)
  local prints = seed.fp ~= "" and {seed.fp, ""} or call("SMEMBERS", P .. "lines:" .. seed.key)
  local best, best_number
  for _, print in ipairs(prints) do
    local line, from, searching = P .. "line:" .. seed.key .. SEP .. print, 0, true
    while searching do
      -- Mostly it is the very first, so look at few at a time.
      local flat = call("ZRANGE", line, from, from + 7, "WITHSCORES")
      if #flat == 0 then break end
      for i = 1, #flat, 2 do
        local waiter, number = read_waiter(flat[i]), tonumber(flat[i + 1])
        from = from + 1
        if best_number and number > best_number then
          searching = false
          break
        elseif not is_alive(waiter.replica) then
          forget_ticket(waiter.ticket)
          from = from - 1
        elseif not is_excluded(waiter, seed.name) then
          best, best_number, searching = waiter, number, false
          break
        end
      end
    end
  end
  return best
end

-- ---- steps that decisions share ---------------------------------------------------------------------------------
local function grant(seed, ask, receiver, ttl, ticket)
  local id = lease_id()
  add_lease(id, seed.name, seed.key, receiver, ttl, ticket)
  count_lease(seed, 1)
  seed.turn = serial()
  write(seed, "turn")
  drop_intent(seed.key, ask.intent)
  rank(seed)
  return {granted = id, host = seed.host, port = tonumber(seed.port), rank = tonumber(seed.rank)}
end

local function notify(waiter) call("PUBLISH", P .. "wake:" .. waiter.replica, waiter.ticket) end

-- give the seed's free slots to those who wait for them, in order
local function serve(seed)
  rank(seed)
  while is_open(seed) do
    local waiter = first_for(seed)
    if not waiter then return end
    unqueue(waiter.key, waiter.fp, waiter.ticket)
    local result = grant(seed, waiter, waiter.receiver, rules.claim_s, waiter.ticket)
    call("HSET", P .. "w:" .. waiter.ticket, "result", cjson.encode(result))
    notify(waiter)
  end
end

local function drop_seed(seed, reason)
  for _, id in ipairs(call("SMEMBERS", P .. "of:" .. seed.name)) do
    local ticket = call("HGET", P .. "lease:" .. id, "ticket")
    unlink_lease(id, seed.name, seed.key)
    count_lease(seed, -1)
    forget_ticket(ticket or "")
    observe("lease_dropped", seed.key, seed.name)
  end
  forget(seed)
  call("DEL", P .. "seed:" .. seed.name)
  leave_nic(seed)
  undue("seed", seed.name, "")
  undue("blocked", seed.name, "")
  count("seeds", -1)
  bereft[seed.key] = true
  observe("seed_dropped", seed.key, seed.name, reason)
end

local function drop_lease(id, name, key)
  unlink_lease(id, name, key)
  local seed = read_seed(name)
  if not seed then return end
  count_lease(seed, -1)
  if seed.draining and seed.leases <= 0 then drop_seed(seed, "withdrawn") else serve(seed) end
end

local function remember(lease, result, outcome)
  if rules.max_history <= 0 then return end
  local held = now - tonumber(lease.at)
  local past = {
    key = lease.key, seed = lease.name, receiver = lease.receiver, result = result, cause = "", nbytes = 0,
    duration_s = held, at = fixed(now),
  }
  if outcome then
    past.cause, past.nbytes = outcome.cause, whole(outcome.nbytes)
    if outcome.duration_s > 0 then past.duration_s = outcome.duration_s end
  end
  call("LPUSH", P .. "history", cjson.encode(past))
  call("LTRIM", P .. "history", 0, rules.max_history - 1)
end

-- ---- time -----------------------------------------------------------------------------------------------------
local fall_due = {
  lease = function(id)
    local lease = hash(P .. "lease:" .. id)
    if not lease then return end
    observe("lease_expired", lease.key, lease.name)
    if lease.ticket ~= "" then forget_ticket(lease.ticket) else remember(lease, "expired") end
    drop_lease(id, lease.name, lease.key)
  end,
  seed = function(name)
    local seed = read_seed(name)
    if seed then drop_seed(seed, "stale") end
  end,
  intent = function(key, intent)
    if drop_intent(key, intent) then observe("intent_expired", key) end
  end,
  blocked = function(name)
    local seed = read_seed(name)
    if not seed then return end
    local till = math.max(seed.aside, seed.held)
    if till > now then due("blocked", name, "", till) end
    serve(seed)
  end,
  waiter = function(ticket) forget_ticket(ticket) end,
}

local function begin()
  if args.now then
    now = args.now
  else
    local time = call("TIME")
    now = tonumber(time[1]) + tonumber(time[2]) / 1000000
  end
  meta = {state = call("HGET", P .. "meta", "state"), born = call("HGET", P .. "meta", "born")}
  if not meta.state then
    meta = {state = string.sub(args.nonce, 1, 8), born = fixed(now)}
    call("HSET", P .. "meta", "state", meta.state, "born", meta.born)
  end
  meta.born = tonumber(meta.born)
  if args.replica then call("ZADD", P .. "replicas", fixed(now + rules.replica_s), args.replica) end
  for _ = 1, DUE_AT_ONCE do
    local member = call("ZRANGEBYSCORE", P .. "due", "-inf", fixed(now), "LIMIT", 0, 1)[1]
    if not member then return end
    call("ZREM", P .. "due", member)
    local kind, name, other = string.match(member, "^(%a+)" .. SEP .. "([^" .. SEP .. "]*)" .. SEP .. "(.*)$")
    fall_due[kind](name, other)
  end
end

-- tell those who now wait for nothing, and forget keys that nothing is known about
local function finish()
  while true do
    local key = next(bereft)
    if not key then break end
    bereft[key], left[key] = nil, true
    for _, pair in ipairs(tickets(key, "")) do
      local waiter = read_waiter(pair[1])
      if waiter and waiter.intent ~= "" and not has_hope(waiter) then
        if is_alive(waiter.replica) then
          unqueue(key, waiter.fp, waiter.ticket)
          call("HSET", P .. "w:" .. waiter.ticket, "result", cjson.encode(miss(waiter)))
          notify(waiter)
        else
          forget_ticket(waiter.ticket)  -- nobody would tell it to load, and others would wait for it
        end
      end
    end
  end
  for key in pairs(left) do
    if shelf_is_empty(key) then
      call("SREM", P .. "keys", key)
      call("DEL", P .. "k:" .. key)
    end
  end
end

-- ---- operations -------------------------------------------------------------------------------------------------
local operations = {}

local function new_life(seed)
  if seed.key ~= args.key then return "rekeyed" end
  if args.epoch ~= "" and seed.epoch ~= "" and seed.epoch ~= args.epoch then return "new epoch" end
  if seed.fp ~= args.fp then return "new fingerprint" end
end

function operations.announce()
  local seed = read_seed(args.name)
  local reason = seed and new_life(seed)
  if reason then
    drop_seed(seed, reason)
    seed = nil
  end
  if not seed then
    if counted("seeds") >= rules.max_seeds then
      return {error = "LimitReached", text = "there are " .. counted("seeds") .. " seeds already"}
    end
    if not has_room_for(args.key) then
      return {error = "LimitReached", text = "there are " .. call("SCARD", P .. "keys") .. " keys already"}
    end
    seed = {
      name = args.name, key = args.key, fp = args.fp, slots = args.slots, labels = args.labels, epoch = args.epoch,
      buckets = args.buckets, nic = args.nic, host = args.host, port = whole(args.port), rank = whole(args.rank),
      first = now, seen = now, turn = serial(), leases = 0, draining = false, failures = 0, aside = 0, held = 0,
    }
    local hold = rules.recovery_hold_s
    if args.known_state ~= "" and args.known_state ~= meta.state then
      hold = math.max(hold, rules.lease_ttl_s)
      observe("state_lost", seed.key, seed.name)
    end
    if meta.born + hold > now then
      seed.held = meta.born + hold
      due("blocked", seed.name, "", seed.held)
    end
    write(seed, "key", "fp", "slots", "labels", "epoch", "buckets", "nic", "host", "port", "rank", "first", "seen",
      "turn", "leases", "draining", "failures", "aside", "held")
    count("seeds", 1)
    call("SADD", P .. "keys", seed.key)
    call("SADD", P .. "ks:" .. seed.key, seed.name)
    call("HINCRBY", P .. "k:" .. seed.key, "slots", seed.slots)
    call("SADD", P .. "nic:" .. seed.nic, seed.name)
    for _, id in ipairs(call("SMEMBERS", P .. "of:" .. seed.name)) do
      call("HSET", P .. "lease:" .. id, "key", seed.key)
      call("ZADD", P .. "held:" .. seed.key, call("HGET", P .. "lease:" .. id, "at"), id)
      count_lease(seed, 1)
    end
    observe("seed_added", seed.key, seed.name)
  else
    if args.epoch ~= "" then seed.epoch = args.epoch end
    if seed.labels ~= args.labels or seed.slots ~= args.slots then
      forget(seed)
      leave_nic(seed)
      seed.labels, seed.slots, seed.nic, seed.buckets = args.labels, args.slots, args.nic, args.buckets
      write(seed, "labels", "slots", "nic", "buckets")
      call("SADD", P .. "ks:" .. seed.key, seed.name)
      call("HINCRBY", P .. "k:" .. seed.key, "slots", seed.slots)
      call("SADD", P .. "nic:" .. seed.nic, seed.name)
      call("HINCRBY", P .. "nicn", seed.nic, seed.leases)
    end
    seed.seen = now
    write(seed, "epoch", "seen")
  end
  due("seed", seed.name, "", now + rules.stale_s)
  drop_intent(seed.key, args.intent)
  serve(seed)
  return {state = meta.state}
end

function operations.withdraw()
  local seed = read_seed(args.name)
  if not seed or seed.key ~= args.key then
    return {error = "UnknownSeed", text = "no seed " .. args.name .. " under this key"}
  end
  if seed.leases <= 0 then
    drop_seed(seed, "withdrawn")
    return {}
  end
  seed.draining = true
  write(seed, "draining")
  bereft[seed.key] = true
  rank(seed)
  return {error = "StillLeased", text = seed.leases .. " leases are still held; the seed is draining"}
end

-- the open seed that the receiver should have
local function best(ask)
  for _, bucket in ipairs(ask.buckets) do
    local found, found_score
    for _, class in ipairs(classes_for(ask.fp)) do
      local flat = call("ZRANGE", pool_key(ask.key, class, bucket), 0, #ask.exclude, "WITHSCORES")
      for i = 1, #flat, 2 do
        if not is_excluded(ask, flat[i]) then
          local weight = tonumber(flat[i + 1])
          if not found or weight < found_score or (weight == found_score and flat[i] < found) then
            found, found_score = flat[i], weight
          end
          break
        end
      end
    end
    if found then
      local seed = read_seed(found)
      if not is_stale(seed) then return seed end
      drop_seed(seed, "stale")  -- only where more fell due than one call works off
      return best(ask)
    end
  end
end

function operations.acquire()
  local seed = best(args)
  if seed then return grant(seed, args, args.receiver, rules.lease_ttl_s, "") end
  local may_wait = args.wait_s > 0 and counted("waiters") < rules.max_waiters and has_room_for(args.key)
    and (args.intent == "" or has_hope(args))
  if not may_wait then return miss(args) end
  local number = serial()
  call("HSET", P .. "w:" .. args.ticket, "key", args.key, "fp", args.fp, "exclude", cjson.encode(args.exclude),
    "intent", args.intent, "receiver", args.receiver, "replica", args.replica, "since", fixed(now),
    "wait_s", fixed(args.wait_s), "result", "")
  call("ZADD", P .. "line:" .. args.key .. SEP .. args.fp, whole(number), args.ticket)
  call("SADD", P .. "lines:" .. args.key, args.fp)
  call("SADD", P .. "keys", args.key)
  call("HINCRBY", P .. "k:" .. args.key, "waiting", 1)
  count("waiters", 1)
  due("waiter", args.ticket, "", now + args.wait_s + rules.wait_grace_s)
  return {queued = true}
end

function operations.settle()
  local waiter = read_waiter(args.ticket)
  if not waiter then return {lost = true} end
  if waiter.result == "" and not args.leave then return {queued = true} end
  forget_ticket(args.ticket)
  local result = waiter.result ~= "" and cjson.decode(waiter.result) or {missed = true}
  if result.missed and not args.loads then
    drop_intent(waiter.key, waiter.intent)
    return {missed = true, intent = false}
  end
  if waiter.result == "" then return miss(waiter) end
  if result.granted then
    call("HSET", P .. "lease:" .. result.granted, "ticket", "")
    due("lease", result.granted, "", now + rules.lease_ttl_s)
  end
  return result
end

function operations.release()
  local lease = hash(P .. "lease:" .. args.user_id)
  if not lease or lease.name ~= args.name then return {error = "UnknownLease", text = "no such lease"} end
  local outcome = type(args.outcome) == "table" and args.outcome or nil
  remember(lease, not outcome and "released" or outcome.ok and "ok" or "failed", outcome)
  local seed = outcome and read_seed(lease.name)
  if seed then
    if outcome.ok then
      seed.failures = 0
      write(seed, "failures")
    elseif outcome.blame then
      seed.failures = seed.failures + 1
      local beyond = seed.failures - rules.failures
      if beyond >= 0 then
        local backoff = math.min(rules.backoff_s * 2 ^ math.min(beyond, 20), rules.max_backoff_s)
        seed.aside = now + backoff
        due("blocked", seed.name, "", math.max(seed.aside, seed.held))
        bereft[seed.key] = true
        observe("seed_aside", seed.key, seed.name, tostring(backoff))
      end
      write(seed, "failures", "aside")
    end
  end
  drop_lease(args.user_id, lease.name, lease.key)
  return {key = lease.key, held_s = now - tonumber(lease.at)}
end

function operations.renew()
  local lease = hash(P .. "lease:" .. args.user_id)
  if not lease then
    local young = now < meta.born + math.max(rules.lease_ttl_s, rules.recovery_hold_s)
    local foreign = args.state ~= "" and args.state ~= meta.state
    if young and foreign and counted("leases") < rules.max_seeds then
      local seed = read_seed(args.name)
      add_lease(args.user_id, args.name, seed and seed.key or "", "(earlier state)", rules.lease_ttl_s, "")
      if seed then
        count_lease(seed, 1)
        rank(seed)
      end
      observe("lease_adopted", seed and seed.key or "", args.name)
      lease = {name = args.name}
    end
  end
  if not lease or lease.name ~= args.name then return {error = "UnknownLease", text = "no such lease"} end
  due("lease", args.user_id, "", now + rules.lease_ttl_s)
  return {}
end

function operations.intend()
  if args.ttl_s <= 0 then
    drop_intent(args.key, args.intent)
  elseif not add_intent(args.key, args.intent, args.fp, args.ttl_s) then
    return {error = "LimitReached", text = "there are too many intents or keys already"}
  end
  return {}
end

function operations.sweep()
  call("ZREMRANGEBYSCORE", P .. "replicas", "-inf", fixed(now - 10 * rules.replica_s))
  local upcoming = call("ZRANGE", P .. "due", 0, 0, "WITHSCORES")[2]
  return {next_s = upcoming and math.max(0, tonumber(upcoming) - now) or -1}
end

function operations.leave()
  call("ZREM", P .. "replicas", args.replica)
  return {}
end
