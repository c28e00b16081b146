-- What is reserved, by whom, until when? `policies/books.py` for all replicas: this runs inside Redis or Valkey.
--
--   EVALSHA <sha> 1 <prefix>:{<partition>} <header> <operation> <operation> ...
--
-- The header is [epoch]; operations and replies are msgpack arrays, one reply for each operation, as
-- `policies/operations.py` and `gateway/limits_script.py` say. `Books` is the reference; where a function here has the
-- name of one there (or in `policies/accounts.py`), it does the same, and a property test compares every reply.
--
-- * Nothing is written before every operation has been answered: what fails leaves nothing half done.
-- * Every key begins with KEYS[1], so all of them share a slot:
--     :a:<account>  {reserved, used, at, shape, mark, slot, units, slot, units, ...}
--     :r:<id>       {state, ends, since, counted, mark, billed} and, until it is settled, the operation that opened it
--     :leases       ids of open reservations by the end of their lease
--     :alive        replicas by when they are taken for dead
--     :gen          which generation of the data this is; see `open`
-- * Numbers are doubles: all are whole and below 2^53.
-- * What can be forgotten expires by itself (KEPT_MS later). Nothing else may go: the server must not evict keys.

local now = (function(t) return t[1] * 1000 + (t[2] - t[2] % 1000) / 1000 end)(redis.call('TIME'))
local prefix = KEYS[1]

local SLOTS, LARGEST_SUM = 60, 9000000000000000
local SETTLED_MS, CANCELLED_MS, EXPIRED_MS, COUNTED_MS = 120000, 600000, 3600000, 86400000
local MOST_AT_ONCE, KEPT_MS = 100, 60000
local BEHIND_MS = 2000
local CUT_MS, TELLING_MS = 600000, 600000

local RESERVED, USED, AT, SHAPE, MARK, FIRST_SLOT = 1, 2, 3, 4, 5, 6

local floor, max, min = math.floor, math.max, math.min
local pack, unpack_one = cmsgpack.pack, cmsgpack.unpack_one

-- The generation of the data. Windows hold nothing that was counted under another `mark`.
local gen = {}
local gen_changed = false

-- What was read, and what is to be written at the end.
local accounts, changed_accounts = {}, {}
local records, changed_records, leases = {}, {}, {}

-- == accounts =========================================================================================================

local function ceil_div(a, b) return -floor(-a / b) end

local function grain_of(rule)
  local tick_ms = rule[3] <= 3600000 and 1 or 1000
  return tick_ms, floor(rule[3] / tick_ms)
end

-- What an account was counted by: 0 for a budget, or the period, negative for a rolling one.
local function shape_of(rule)
  local kind = rule[1]
  if kind == 'rate' then return rule[3] elseif kind == 'rolling' then return -rule[3] else return 0 end
end

local function account(name)
  local found = accounts[name]
  if not found then
    local stored = redis.call('GET', prefix .. ':a:' .. name)
    found = stored and cmsgpack.unpack(stored) or {0, 0, 0, 0, 0}
    accounts[name] = found
  end
  return found
end

local function next_start(rule, window)
  for _, start in ipairs(rule[3]) do
    if start > window then return start end
  end
end

-- Index of the first slot of `a` that counts now.
local function first_live(a, rule, slot_ms)
  if a[SHAPE] ~= -rule[3] or a[MARK] ~= gen.mark then return #a + 1 end
  local oldest, i = floor(now / slot_ms) - SLOTS, FIRST_SLOT
  while a[i] and a[i] < oldest do i = i + 2 end
  return i
end

local function used_of(a, rule)
  local kind = rule[1]
  if kind == 'rate' then
    local tick = floor(now / grain_of(rule))
    if a[USED] == 0 or a[SHAPE] ~= rule[3] then return 0, tick end
    local at = a[AT]
    if tick <= at then return a[USED], at end
    return max(0, a[USED] - (tick - at) * rule[2]), tick
  elseif kind == 'budget' then
    local used = a[SHAPE] == 0 and a[MARK] == gen.mark and a[USED] or 0
    local window = rule[3][1] or 0
    for _, start in ipairs(rule[3]) do
      if start > now then break end
      window = start
    end
    if used > 0 and window <= a[AT] then return used, a[AT] end
    return 0, window
  elseif kind == 'rolling' then
    local sum = 0
    for i = first_live(a, rule, ceil_div(rule[3], SLOTS)), #a, 2 do sum = sum + a[i + 1] end
    return min(LARGEST_SUM, sum), 0
  end
  return 0, 0
end

local function drained_ms(rule, tick_ms, level, at)
  if rule[2] > 0 then return (at + ceil_div(level, rule[2])) * tick_ms end
end

local function room(a, rule, asked)
  if asked <= 0 then return nil end
  local kind, limit = rule[1], rule[2]
  local used, at = used_of(a, rule)
  if kind == 'rate' then
    if asked > rule[4] then return 'never', -1 end
    local tick_ms, period = grain_of(rule)
    local used_excess = used + (asked - rule[4]) * period
    local excess = used_excess + a[RESERVED] * period
    if excess <= 0 then return nil end
    local ends = drained_ms(rule, tick_ms, excess, at)
    return used_excess > 0 and 'used' or 'reserved', ends and ends - now or -1
  end
  if asked > limit then return 'never', -1 end
  local excess = used + a[RESERVED] + asked - limit
  if excess <= 0 then return nil end
  local ends
  if excess <= used then
    if kind == 'budget' then
      ends = next_start(rule, at)
    elseif kind == 'rolling' then
      local slot_ms, left = ceil_div(rule[3], SLOTS), excess
      for i = first_live(a, rule, slot_ms), #a, 2 do
        left = left - a[i + 1]
        if left <= 0 then
          ends = (a[i] + SLOTS + 1) * slot_ms
          break
        end
      end
    end
  end
  return used + asked > limit and 'used' or 'reserved', ends and ends - now or -1
end

-- An account as `a`, but with only those slots that count now.
local function without_dead_slots(a, rule, slot_ms)
  local kept = {a[RESERVED], 0, 0, -rule[3], gen.mark}
  for i = first_live(a, rule, slot_ms), #a do kept[#kept + 1] = a[i] end
  return kept
end

local function is_window(rule) return rule[1] == 'budget' or rule[1] == 'rolling' end

local function take_rolling(name, a, rule, units, time)
  local slot_ms = ceil_div(rule[3], SLOTS)
  local slot = floor(min(time or now, now) / slot_ms)
  if slot < floor(now / slot_ms) - SLOTS then return end
  changed_accounts[name] = rule
  if a[SHAPE] ~= -rule[3] or first_live(a, rule, slot_ms) ~= FIRST_SLOT then
    a = without_dead_slots(a, rule, slot_ms)
    accounts[name] = a
  end
  local i = #a - 1
  if not time and i >= FIRST_SLOT then slot = max(slot, a[i]) end
  while i >= FIRST_SLOT and a[i] > slot do i = i - 2 end
  if i >= FIRST_SLOT and a[i] == slot then
    a[i + 1] = min(LARGEST_SUM, a[i + 1] + units)
  else
    table.insert(a, i + 2, slot)
    table.insert(a, i + 3, min(LARGEST_SUM, units))
  end
end

local function take(entry, units, time)
  local name, rule = entry[1], entry[2]
  local kind = rule[1]
  if units <= 0 or kind == 'concurrency' then return end
  local a = account(name)
  if kind == 'rolling' then return take_rolling(name, a, rule, units, time) end
  local used, at = used_of(a, rule)
  if time and kind == 'budget' and time < at then return end
  changed_accounts[name] = rule
  if kind == 'rate' then
    local _, period = grain_of(rule)
    units = units * period
  end
  if a[FIRST_SLOT] then
    a = {a[RESERVED]}
    accounts[name] = a
  end
  a[USED], a[AT], a[SHAPE], a[MARK] = min(LARGEST_SUM, used + units), at, shape_of(rule), gen.mark
end

local function correct(entry, units, since)
  local name, rule = entry[1], entry[2]
  local kind = rule[1]
  if units <= 0 or kind == 'concurrency' then return end
  local a = account(name)
  if kind == 'rolling' then
    local slot_ms = ceil_div(rule[3], SLOTS)
    local first, slot = first_live(a, rule, slot_ms), floor(since / slot_ms)
    if first > #a then return end
    local kept = {a[RESERVED], 0, 0, -rule[3], gen.mark}
    for i = first, #a, 2 do
      local left = a[i] == slot and a[i + 1] - units or a[i + 1]
      if left > 0 then
        kept[#kept + 1] = a[i]
        kept[#kept + 1] = left
      end
    end
    accounts[name] = kept
    changed_accounts[name] = rule
    return
  end
  local used, at = used_of(a, rule)
  if kind == 'rate' then
    local tick_ms, period = grain_of(rule)
    local drained = max(0, floor(now / tick_ms) - floor(since / tick_ms)) * rule[2]
    units = min(LARGEST_SUM, units * period) - min(LARGEST_SUM, drained)
  elseif at > since then
    return
  end
  if used == 0 or units <= 0 then return end
  a[USED], a[AT] = max(0, used - units), at
  changed_accounts[name] = rule
end

local function hold(entry, units)
  if units == 0 then return end
  local name = entry[1]
  local a = account(name)
  a[RESERVED] = a[RESERVED] + units
  changed_accounts[name] = entry[2]
end

local function standing(a, rule)
  local used, at = used_of(a, rule)
  local kind, ends = rule[1], now
  if kind == 'rate' then
    local tick_ms, period = grain_of(rule)
    if used > 0 then ends = drained_ms(rule, tick_ms, used, at) end
    used = ceil_div(used, period)
  elseif kind == 'budget' then
    ends = next_start(rule, at)
  elseif kind == 'rolling' and used > 0 then
    ends = (a[#a - 1] + SLOTS + 1) * ceil_div(rule[3], SLOTS)
  end
  return {used, a[RESERVED], ends and ends - now or -1}
end

local function standings_of(entries)
  local list = {}
  for i, entry in ipairs(entries) do list[i] = standing(account(entry[1]), entry[2]) end
  return list
end

-- == reservations =====================================================================================================

local function find(id)
  local record = records[id]
  if record == nil then
    local stored = redis.call('GET', prefix .. ':r:' .. id)
    record = false
    if stored then
      local offset, head = unpack_one(stored, 0)
      record = {
        state = head[1], ends = head[2], since = head[3], counted = head[4], mark = head[5] or 0, billed = head[6],
      }
      record.opened_by = offset == -1 and '' or string.sub(stored, offset + 1)
    end
    records[id] = record
  end
  if record and (record.state == 'open' or record.ends > now) then return record end
end

local function entries_of(record)
  if not record.entries then record.entries = cmsgpack.unpack(record.opened_by)[3] end
  return record.entries
end

local function unsettled(record) return record and (record.state == 'open' or record.state == 'expired') end

local function remaining(entry, counted)
  if entry[2][1] == 'concurrency' then return entry[4] end
  if is_window(entry[2]) then return max(entry[4], counted) end
  return max(0, entry[4] - counted)
end

local function move(record, sign)
  for i, entry in ipairs(entries_of(record)) do
    if not (record.billed and is_window(entry[2])) then hold(entry, sign * remaining(entry, record.counted[i])) end
  end
end

local function release(id, record)
  if record.state == 'open' then
    move(record, -1)
    leases[id] = false
  end
end

local function keep(id, record)
  records[id] = record
  changed_records[id] = true
  if record.state == 'open' then
    leases[id] = record.ends
    move(record, 1)
  end
end

local function remember(id, state, for_ms)
  keep(id, {state = state, ends = now + for_ms, since = 0, counted = {}, opened_by = '', mark = gen.mark})
end

local function take_all(entries, times)
  for i, entry in ipairs(entries) do take(entry, entry[3], times and times[i]) end
end

local function count(entries, counted, amounts, since)
  for i, entry in ipairs(entries) do
    if not is_window(entry[2]) then
      local more = (amounts[i] or 0) - (counted[i] or 0)
      take(entry, more)
      correct(entry, -more, since)
    end
  end
end

local function uncount(record)
  if record.state ~= 'expired' or record.mark ~= gen.mark or record.billed then return end
  for i, entry in ipairs(entries_of(record)) do
    if is_window(entry[2]) then correct(entry, record.counted[i], record.ends - EXPIRED_MS) end
  end
end

local function known_bill(id)
  local record = find(id)
  return record and record.mark == gen.mark
end

local function telling() return gen.lost and (not gen.seeded or now < gen.telling_until) end

-- Where it is not doubtful a reservation that is known knows itself that its bill was told.
local function count_windows(op, entries, amounts, doubtful)
  local time, bill = op[5] or 0, op[6] or ''
  doubtful = doubtful and bill ~= ''
  if (time > 0 and time < gen.cut) or (doubtful and known_bill(bill)) then return end
  for i, entry in ipairs(entries) do
    if is_window(entry[2]) then take(entry, amounts[i], time > 0 and time or nil) end
  end
  if doubtful then remember(bill, 'settled', COUNTED_MS) end
end

local function enter(op, raw, so_far, lease_ms)
  local entries, counted = op[3], {}
  take_all(entries)
  count(entries, {}, so_far, 0)
  for i = 1, #entries do counted[i] = so_far[i] or 0 end
  local ends = now + max(1, lease_ms)
  keep(op[2], {
    state = 'open', ends = ends, since = now, counted = counted, mark = gen.mark, opened_by = raw, entries = entries,
  })
end

local function renew(id, so_far, lease_ms)
  local record = find(id)
  if not unsettled(record) then return false end
  local entries, counted, since = entries_of(record), {}, record.since
  for i = 1, #entries do
    counted[i] = max(record.counted[i], so_far[i] or 0)
    if counted[i] ~= record.counted[i] then since = now end
  end
  release(id, record)
  uncount(record)
  count(entries, record.counted, counted, record.since)
  keep(id, {
    state = 'open', ends = now + max(1, lease_ms), since = since, counted = counted, mark = record.mark,
    billed = record.billed, opened_by = record.opened_by, entries = entries,
  })
  return true
end

-- Leases that had run out when the batch began. What a batch itself changes runs out later than now.
local due, next_due

local function expire(most)
  if not due then
    due, next_due = redis.call('ZRANGEBYSCORE', prefix .. ':leases', '-inf', now, 'LIMIT', 0, most), 1
  end
  local left = MOST_AT_ONCE
  while left > 0 and due[next_due] do
    local id = due[next_due]
    next_due = next_due + 1
    local record = find(id)
    if not record then
      leases[id] = false
    elseif record.state == 'open' and record.ends <= now then
      left = left - 1
      release(id, record)
      for i, entry in ipairs(record.billed and {} or entries_of(record)) do
        if is_window(entry[2]) then take(entry, record.counted[i], now) end
      end
      record.state, record.ends, record.mark = 'expired', now + EXPIRED_MS, gen.mark
      changed_records[id] = true
    end
  end
end

-- == operations =======================================================================================================

local operations = {}

function operations.reserve(op, raw)
  local id, entries = op[2], op[3]
  local record = find(id)
  if record then
    if record.state == 'cancelled' then return {'refused', now, standings_of(entries), {}} end
    return {'granted', now, standings_of(entries), {}}
  end
  local asked, short, refused = {}, {}, false
  for i, entry in ipairs(entries) do
    local name = entry[1]
    local units = (asked[name] or 0) + entry[3] + entry[4]
    asked[name] = units
    local why, wait_ms = room(account(name), entry[2], units)
    if why then
      short[#short + 1] = {i - 1, why, wait_ms}
      refused = refused or not entry[5]
    end
  end
  if refused then return {'refused', now, standings_of(entries), short} end
  enter(op, raw, {}, op[4])
  return {'granted', now, standings_of(entries), short}
end

function operations.settle(op)
  local id, actual, entries = op[2], op[3], op[4] or {}
  local record = find(id)
  if unsettled(record) then
    local reserved, amounts = entries_of(record), {}
    for i = 1, #reserved do amounts[i] = actual[i] or 0 end
    release(id, record)
    uncount(record)
    count(reserved, record.counted, amounts, record.since)
    if not record.billed then count_windows(op, reserved, amounts, telling()) end
    remember(id, 'settled', SETTLED_MS)
    return {'done', now, true, {}}
  end
  if #entries == 0 or (record and record.state == 'settled' and record.mark == gen.mark) then
    return {'done', now, false, {}}
  end
  local spent = {}
  for i, entry in ipairs(entries) do
    spent[i] = entry[3] + (actual[i] or 0)
    if not is_window(entry[2]) and not (record and record.state == 'settled') then
      take(entry, entry[3])
      take(entry, actual[i] or 0)
    end
  end
  count_windows(op, entries, spent, true)
  remember(id, 'settled', COUNTED_MS)
  return {'done', now, false, {}}
end

function operations.renew(op) return {'done', now, renew(op[2], op[3], op[4]), {}} end

function operations.cancel(op)
  local id = op[2]
  local record = find(id)
  local known = unsettled(record) and true or false
  if known then
    release(id, record)
    uncount(record)
    for i, entry in ipairs(entries_of(record)) do
      if not is_window(entry[2]) then
        correct(entry, entry[3] + record.counted[i], record.since)
      elseif record.mark == gen.mark then
        correct(entry, entry[3], record.since)
      end
    end
  end
  if known or not record then remember(id, 'cancelled', CANCELLED_MS) end
  return {'done', now, known, {}}
end

function operations.announce(op, raw)
  local known = find(op[2]) and true or false
  if known then renew(op[2], op[4], op[5]) else enter(op, raw, op[4], op[5]) end
  return {'done', now, known, {}}
end

function operations.charge(op)
  local known = find(op[2]) and true or false
  if not known then
    take_all(op[3], op[4])
    remember(op[2], 'settled', COUNTED_MS)
  end
  return {'done', now, not known, {}}
end

function operations.tell(op)
  local id, entries, time, times, of, missing = op[2], op[3], op[4], op[5] or {}, op[6] or {}, op[7] ~= false
  if time < gen.cut or known_bill(id) then return {'done', now, false, {}} end
  local found = false
  for _, reserved in ipairs(of) do
    local record = find(reserved)
    if unsettled(record) then
      found = found or not record.billed
      local open = record.state == 'open'
      if open then move(record, -1) else uncount(record) end
      record.billed = true
      changed_records[reserved] = true
      if open then move(record, 1) end
    elseif record and record.state == 'settled' and record.mark == gen.mark then
      return {'done', now, false, {}}
    end
  end
  if not found and not missing then return {'done', now, false, {}} end
  for i, entry in ipairs(entries) do
    if is_window(entry[2]) then
      take(entry, entry[3], times[i] or time)
      correct(entry, -entry[3], times[i] or time)
    end
  end
  remember(id, 'settled', COUNTED_MS)
  return {'done', now, true, {}}
end

function operations.look(op) return {'done', now, true, standings_of(op[2])} end

function operations.seed(op)
  if gen.seeded then return {'done', now, false, {}} end
  gen.seeded, gen.totals, gen_changed = true, true, true
  gen.telling_until = now + TELLING_MS
  for _, entry in ipairs(op[2]) do
    if is_window(entry[2]) then take(entry, entry[3]) end
  end
  return {'done', now, true, {}}
end

-- == generations ======================================================================================================

local function begin(run, lost)
  gen.serial = max(now, gen.serial + 1)
  gen.mark = gen.serial
  gen.epoch = string.sub(run, 1, 8) .. '-' .. string.format('%.0f', gen.serial)
  gen.run, gen.lost, gen.seeded, gen.totals = run, lost, not lost, false
  gen.resumed, gen.opened = now, now
  gen.cut, gen.telling_until = lost and now - CUT_MS or 0, 0
  gen_changed = true
end

-- Somebody who knows better says that windows do not hold what they should.
local function lose()
  begin(gen.run, true)
  return {'stale', now, gen.epoch}
end

-- A caller has (re)connected to the run `run` of the server. It remembers the epoch `known` and the time `acked` of the
-- last answer to an `open` or `beat` in it; '' and 0: it remembers nothing. `resumed` is the beat that the data held when
-- this run was first seen (`opened`): acknowledged times between the two were lost with what was written then, but for
-- BEHIND_MS, which a failover or a crash may lose without being called a loss.
--
--   the data is of         the caller remembers                       | then
--   nobody (no :gen)       nothing                                    | a new deployment: new epoch, seeded, unless there
--                                                                     | is a `ledger` that knows better
--                          an epoch                                   | all was lost: new epoch, not seeded
--   an epoch               nothing                                    | it goes on
--                          this one, and no lost time                 | it goes on
--                          this or another one, and a lost time       | an old copy: new epoch, not seeded
--                          another one; this one began with a loss    | somebody was here before: it goes on
--                          another one; this one began without one    | all was lost, and a caller without memory took it
--                                                                     | for new: new epoch, not seeded
--
-- Windows hold nothing in a new epoch: their totals have what was counted before its `cut`, and what was counted since
-- is told bill by bill. The last two kinds of loss begin no epoch where a `Seed` has counted since this run was first
-- seen: then the `totals` are there. The caller is told of its loss in any case.
local function open(op)
  local run, known, acked = op[2], op[3], op[4]
  local lost = false
  if gen.epoch == '' then
    lost = known ~= ''
    begin(run, lost or op[5] == true)
  else
    local restarted = gen.run ~= run
    if restarted then gen.run, gen.resumed, gen.opened, gen.totals = run, gen.beat, now, false end
    if known ~= '' then
      local old_copy = acked > gen.resumed + BEHIND_MS and (restarted or acked < gen.opened)
      local another = known ~= gen.epoch
      lost = old_copy or another
      if (old_copy or (another and not gen.lost)) and not gen.totals then begin(run, true) end
    end
  end
  gen.beat, gen_changed = now, true
  return {'opened', now, gen.epoch, gen.seeded, lost, gen.cut}
end

local function beat(op)
  local replica, ttl_ms, leaving = op[2], op[3], op[4]
  local key = prefix .. ':alive'
  redis.call('ZREMRANGEBYSCORE', key, '-inf', now)
  if leaving then redis.call('ZREM', key, replica) else redis.call('ZADD', key, now + ttl_ms, replica) end
  gen.beat, gen_changed = now, true
  local replicas = redis.call('ZRANGE', key, 0, -1)
  -- Strings by their bytes: Lua's own comparison asks the server's locale.
  local function before(a, b)
    for i = 1, min(#a, #b) do
      local x, y = string.byte(a, i), string.byte(b, i)
      if x ~= y then return x < y end
    end
    return #a < #b
  end
  table.sort(replicas, before)
  return {'alive', now, gen.epoch, gen.seeded, replicas}
end

-- == writing ==========================================================================================================

-- For how long an account must be kept; nil: for ever.
local function lifetime_ms(a, rule)
  if a[RESERVED] > 0 then return nil end
  -- Counted under another kind of rule than the one that touched it last: whoever counts in it will say more.
  if a[SHAPE] ~= shape_of(rule) then return EXPIRED_MS end
  local ends = now
  if rule[1] == 'rate' then
    ends = drained_ms(rule, grain_of(rule), a[USED], a[AT])
  elseif rule[1] == 'budget' then
    ends = next_start(rule, a[AT])
  elseif rule[1] == 'rolling' then
    ends = (a[#a - 1] + SLOTS + 1) * ceil_div(rule[3], SLOTS)
  end
  return ends and max(0, ends - now) + KEPT_MS
end

local function write_accounts()
  for name, rule in pairs(changed_accounts) do
    local a, key = accounts[name], prefix .. ':a:' .. name
    if a[RESERVED] == 0 and a[USED] == 0 and not a[FIRST_SLOT] then
      redis.call('DEL', key)
    else
      local ms = lifetime_ms(a, rule)
      if ms then redis.call('SET', key, pack(a), 'PX', ms) else redis.call('SET', key, pack(a)) end
    end
  end
end

local function write_records()
  for id in pairs(changed_records) do
    local record = records[id]
    local head = {record.state, record.ends, record.since, record.counted, record.mark, record.billed or false}
    local value = pack(head) .. record.opened_by
    if record.state == 'open' then
      redis.call('SET', prefix .. ':r:' .. id, value)
    else
      redis.call('SET', prefix .. ':r:' .. id, value, 'PX', record.ends - now + KEPT_MS)
    end
  end
  for id, ends in pairs(leases) do
    if ends then redis.call('ZADD', prefix .. ':leases', ends, id) else redis.call('ZREM', prefix .. ':leases', id) end
  end
end

-- == the batch ========================================================================================================

local read = redis.call(
  'HMGET', prefix .. ':gen', 'epoch', 'mark', 'serial', 'run', 'seeded', 'lost', 'beat', 'resumed', 'opened', 'totals',
  'cut', 'telling_until'
)
gen.epoch, gen.run = read[1] or '', read[4] or ''
gen.mark, gen.serial = tonumber(read[2] or 0), tonumber(read[3] or 0)
gen.seeded, gen.lost = read[5] == '1', read[6] == '1'
gen.beat, gen.resumed = tonumber(read[7] or 0), tonumber(read[8] or 0)
gen.opened, gen.totals = tonumber(read[9] or 0), read[10] == '1'
gen.cut, gen.telling_until = tonumber(read[11] or 0), tonumber(read[12] or 0)
local epoch = cmsgpack.unpack(ARGV[1])[1]
local replies = {}
for i = 2, #ARGV do
  local op, reply = cmsgpack.unpack(ARGV[i]), nil
  if op[1] == 'open' then
    reply = open(op)
  elseif gen.epoch == '' or epoch ~= gen.epoch then
    reply = {'stale', now, gen.epoch}
  elseif op[1] == 'beat' then
    reply = beat(op)
  elseif op[1] == 'lose' then
    reply = lose()
  else
    expire(MOST_AT_ONCE * #ARGV)
    reply = operations[op[1]](op, ARGV[i])
  end
  replies[i - 1] = pack(reply)
end
write_accounts()
write_records()
if gen_changed then
  redis.call(
    'HSET', prefix .. ':gen', 'epoch', gen.epoch, 'mark', gen.mark, 'serial', gen.serial, 'run', gen.run,
    'seeded', gen.seeded and 1 or 0, 'lost', gen.lost and 1 or 0, 'beat', gen.beat, 'resumed', gen.resumed,
    'opened', gen.opened, 'totals', gen.totals and 1 or 0, 'cut', gen.cut, 'telling_until', gen.telling_until
  )
end
return replies
