-- What people look at, over Redis: views.py and overview.py in Redis's words. The second half of decisions.lua: decides
-- nothing, and changes nothing. Lists are cut here, since Redis serves nobody else meanwhile.

local function totals_of(key)
  local sums = hash(P .. "k:" .. key) or {}
  local waiting, since = tonumber(sums.waiting or "0"), nil
  for _, print in ipairs(waiting > 0 and call("SMEMBERS", P .. "lines:" .. key) or {}) do
    local first = call("ZRANGE", P .. "line:" .. key .. SEP .. print, 0, 0)[1]
    local at = first and tonumber(call("HGET", P .. "w:" .. first, "since") or "")
    if at and (not since or at < since) then since = at end
  end
  return {
    seeds = call("SCARD", P .. "ks:" .. key), draining = call("SCARD", P .. "drain:" .. key),
    aside = call("SCARD", P .. "aside:" .. key), slots = tonumber(sums.slots or "0"),
    leases = tonumber(sums.leases or "0"), waiting = waiting,
    intents = call("HLEN", P .. "int:" .. key), oldest_wait_s = since and now - since or 0,
  }
end

function operations.totals()
  local all = {}
  for _, key in ipairs(call("SMEMBERS", P .. "keys")) do all[key] = totals_of(key) end
  return {totals = all}
end

local function show_seed(out, name)
  local seed = read_seed(name)
  if not seed then return end
  seed.buckets = nil
  out.seeds[#out.seeds + 1] = seed
end

local function show_lease(out, id)
  local lease = hash(P .. "lease:" .. id)
  if not lease then return end
  lease.id, lease.expires = id, call("ZSCORE", P .. "due", "lease" .. SEP .. id .. SEP)
  out.leases[#out.leases + 1] = lease
end

local function show_waiter(out, place, ticket)
  local waiter = read_waiter(ticket)
  waiter.place, waiter.exclude, waiter.result = place, nil, nil
  out.waiting[#out.waiting + 1] = waiter
end

local function blank()
  return {
    state = meta.state, born_s = now - meta.born, now = fixed(now), totals = {}, seeds = {}, leases = {},
    waiting = {}, intents = {}, history = {},
  }
end

-- an empty table would arrive as an object
local function shown(out)
  for name, list in pairs(out) do if type(list) == "table" and next(list) == nil then out[name] = nil end end
  return out
end

function operations.snapshot()
  local keys = args.key and {args.key} or call("SMEMBERS", P .. "keys")
  table.sort(keys)
  local out = blank()
  for number, key in ipairs(keys) do
    if number > args.limit then break end
    if not shelf_is_empty(key) then out.totals[key] = totals_of(key) end
    for _, name in ipairs(call("SMEMBERS", P .. "ks:" .. key)) do
      if #out.seeds >= args.limit then break end
      show_seed(out, name)
    end
    for _, id in ipairs(call("ZRANGE", P .. "held:" .. key, 0, args.limit)) do
      if #out.leases >= args.limit then break end
      show_lease(out, id)
    end
    for place, pair in ipairs(tickets(key, "", args.limit + 1)) do
      if #out.waiting >= args.limit then break end
      show_waiter(out, place, pair[1])
    end
    local flat = call("HGETALL", P .. "int:" .. key)
    for i = 1, #flat, 2 do
      if #out.intents >= args.limit then break end
      out.intents[#out.intents + 1] = {key = key, intent = flat[i], fingerprint = flat[i + 1]}
    end
  end
  for _, text in ipairs(call("LRANGE", P .. "history", 0, -1)) do
    if #out.history >= args.limit then break end
    local past = cjson.decode(text)
    if not args.key or past.key == args.key then out.history[#out.history + 1] = past end
  end
  return shown(out)
end

-- the totals of some keys, and where to go on: a few at a time, so that Redis serves others in between
function operations.tally()
  local found = call("SSCAN", P .. "keys", args.cursor, "COUNT", args.count)
  local some = {}
  for _, key in ipairs(found[2]) do some[key] = totals_of(key) end
  return {cursor = found[1], totals = some}
end

-- the first of the seeds of a key, those in trouble before the others; few of however many there are
local function show_seeds(out, key)
  local taken, count = {}, 0
  for _, set in ipairs({"aside:", "drain:", "ks:"}) do
    if count >= args.seeds then return end
    -- SSCAN gives about as many as it is asked for, where SMEMBERS gives all
    for _, name in ipairs(call("SSCAN", P .. set .. key, 0, "COUNT", args.seeds + count)[2]) do
      if count >= args.seeds or #out.seeds >= args.limit then return end
      if not taken[name] then
        taken[name], count = true, count + 1
        show_seed(out, name)
      end
    end
  end
end

-- few of everything: so many seeds, leases and waiting of each key as the arguments say, and `limit` of all
function operations.overview()
  local out = blank()
  for _, key in ipairs(args.keys) do
    show_seeds(out, key)
    for _, id in ipairs(call("ZRANGE", P .. "held:" .. key, 0, args.leases - 1)) do
      if #out.leases < args.limit then show_lease(out, id) end
    end
    for place, pair in ipairs(tickets(key, "", args.waiting)) do
      if place > args.waiting or #out.waiting >= args.limit then break end
      show_waiter(out, place, pair[1])
    end
    local flat = call("HSCAN", P .. "int:" .. key, 0, "COUNT", args.limit)[2]
    for i = 1, #flat, 2 do
      if #out.intents >= args.limit then break end
      out.intents[#out.intents + 1] = {key = key, intent = flat[i], fingerprint = flat[i + 1]}
    end
  end
  out.history = call("LRANGE", P .. "history", 0, args.past - 1)
  return shown(out)
end

-- ---- the operation ------------------------------------------------------------------------------------------------
begin()
local result = operations[ARGV[1]]()
finish()
return cjson.encode({r = result, ev = #events > 0 and events or nil})
