"""What the server does in one step: Lua, run by its digest.

KEYS are Names.keys: the list of items, the notes (a hash), the times (a sorted set:
where each batch begins -> "position:milliseconds"), and the last popped item. Notes:

- `base`: how many items were trimmed or cleared before the list's first one, so that
  positions stay what they were;
- `batches`: tokens of the last appends. A client sends a command again when its
  connection breaks, though the first may have arrived: a known token does nothing;
- `cleared`: the token and count of the last clear, for the same reason;
- `fence`: the newest lease that a run has come with.

Every script looks at the kinds of keys and at the fence before it writes, and Redis
refuses a script for lack of memory before its first write: nothing is half-written.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

# How many tokens are remembered: as many batches may lie between a lost answer and
# the second try.
BATCHES = 32
# Hexadecimal characters.
TOKEN_LENGTH = 16
# For how long a popped item can be asked for again, in milliseconds.
POPPED_MS = 30_000
# For how long positions of a session without items are remembered.
EMPTY_MS = 600_000

_PRELUDE = f"""
local items, notes, times, popped = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local call = redis.call

local function wrong_kind()
  local kinds = {{'list', 'hash', 'zset', 'string'}}
  for index, kind in ipairs(kinds) do
    local found = call('TYPE', KEYS[index]).ok
    if found ~= 'none' and found ~= kind then
      return redis.error_reply('WRONGTYPE a session key holds a ' .. found)
    end
  end
end

local function lost(fence)
  if fence == '' then return end
  local newest = tonumber(call('HGET', notes, 'fence') or -1)
  if tonumber(fence) < newest then return redis.error_reply('LEASELOST') end
  if tonumber(fence) > newest then call('HSET', notes, 'fence', fence) end
end

local function base_of()
  return tonumber(call('HGET', notes, 'base') or 0)
end

local function expire(ttl, sliding)
  if ttl > 0 and (sliding == '1' or call('PTTL', items) == -1) then
    call('PEXPIRE', items, ttl)
  end
  local left = call('PTTL', items)
  if left == -2 then left = {EMPTY_MS} end
  for _, key in ipairs({{notes, times}}) do
    if left > 0 then
      call('PEXPIRE', key, left)
    else
      call('PERSIST', key)
    end
  end
end
"""

# Whether Python is sure to read a text as a JSON object. A doubtful one is not decided
# here: cjson takes some numbers that JSON has not, and leaves out lone surrogates.
READABLE = r"""
local function readable(text)
  if #text > 65536 or string.sub(text, 1, 1) ~= '{' then return false end
  if string.find(text, '[^\32-\126]') then return false end
  local bare = string.gsub(text, '\\.', '')
  bare = string.gsub(bare, '"[^"]*"', '')
  for _, word in ipairs({'true', 'false', 'null'}) do
    bare = string.gsub(bare, word, '0')
  end
  if string.find(bare, '[^%d%[%]{}:,%.eE+%- ]') then return false end
  local _, depth = string.gsub(bare, '[%[{]', '')
  if depth > 200 then return false end
  for number in string.gmatch(bare, '[%d%.eE+%-]+') do
    local rest = string.match(number, '^%-?0(.*)$')
      or string.match(number, '^%-?[1-9]%d*(.*)$')
    if not rest or #number > 300 then return false end
    rest = string.match(rest, '^%.%d+(.*)$') or rest
    if rest ~= '' and not string.match(rest, '^[eE][+-]?%d+$') then return false end
  end
  return (pcall(cjson.decode, text))
end
"""


@dataclass(frozen=True)
class Script:
    """A script and the digest under which a server keeps it."""

    body: str
    text: bytes = field(init=False)
    digest: bytes = field(init=False)

    def __post_init__(self) -> None:
        text = (_PRELUDE + self.body).encode()
        digest = hashlib.sha1(text, usedforsecurity=False).hexdigest().encode()
        object.__setattr__(self, "text", text)
        object.__setattr__(self, "digest", digest)


# ARGV: token, fence, ttl in ms, whether it slides, how many items are kept, whether
# those that are there go, items … Gives how many items there are.
APPEND = Script(f"""
local token, fence, ttl, sliding = ARGV[1], ARGV[2], tonumber(ARGV[3]), ARGV[4]
local most, goes, first = tonumber(ARGV[5]), ARGV[6] == '1', 7
local wrong = wrong_kind() or lost(fence)
if wrong then return wrong end
local batches = call('HGET', notes, 'batches') or ''
local count = call('LLEN', items)
if string.find(batches, token, 1, true) then return count end
local base, left = base_of(), call('PTTL', items)
if goes then
  call('UNLINK', items, times, popped)
  base, count = base + count, 0
  call('HSET', notes, 'base', string.format('%d', base))
end
-- First, because a full server refuses this, and nothing after a script's first write.
for start = first, #ARGV, 1000 do
  call('RPUSH', items, unpack(ARGV, start, math.min(start + 999, #ARGV)))
end
if goes and left > 0 then call('PEXPIRE', items, left) end
local position = string.format('%d', base + count + 1)
local now = call('TIME')
local stamp = string.format('%.0f', now[1] * 1000 + math.floor(now[2] / 1000))
-- Others, such as the SDK, take items away without a word about their times.
call('ZREMRANGEBYSCORE', times, position, '+inf')
call('ZADD', times, position, position .. ':' .. stamp)
batches = string.sub(token .. batches, 1, {BATCHES * TOKEN_LENGTH})
call('HSET', notes, 'batches', batches)
count = count + #ARGV - first + 1
if most > 0 and count > most then
  call('LTRIM', items, -most, -1)
  base = base + count - most
  call('HSET', notes, 'base', string.format('%d', base))
  count = most
  local kept = call('ZREVRANGEBYSCORE', times, base + 1, '-inf',
    'WITHSCORES', 'LIMIT', 0, 1)
  if kept[2] then call('ZREMRANGEBYSCORE', times, '-inf', '(' .. kept[2]) end
end
expire(ttl, sliding)
return count
""")

# ARGV: fence, ttl in ms, whether it slides, how many of the newest. Gives their texts.
LATEST = Script("""
local wrong = wrong_kind() or lost(ARGV[1])
if wrong then return wrong end
if ARGV[3] == '1' or ARGV[1] ~= '' then
  expire(ARGV[3] == '1' and tonumber(ARGV[2]) or 0, ARGV[3])
end
return call('LRANGE', items, '-' .. ARGV[4], -1)
""")

# ARGV: token, fence, ttl in ms, whether it slides, how many texts to give where the
# newest is doubtful, and of the one that the caller chose among these: its place from
# the end, how many items there were, its text.
# Gives 1, the text and how many are left; or 0 and the newest texts, to choose from.
POP = Script(
    READABLE
    + f"""
local token, fence, ttl, sliding = ARGV[1], ARGV[2], tonumber(ARGV[3]), ARGV[4]
local window, place = ARGV[5], tonumber(ARGV[6])
local wrong = wrong_kind() or lost(fence)
if wrong then return wrong end
local count = call('LLEN', items)
local before = call('GET', popped)
if before and string.sub(before, 1, {TOKEN_LENGTH}) == token then
  return {{1, string.sub(before, {TOKEN_LENGTH} + 1), count}}
end
local text = call('LINDEX', items, -math.max(place, 1))
if not text then return {{0, count, {{}}}} end
if place > 0 and not (count == tonumber(ARGV[7]) and text == ARGV[8])
  or place == 0 and not readable(text) then
  return {{0, count, call('LRANGE', items, '-' .. window, -1)}}
end
if place <= 1 then
  call('RPOP', items)
else
  -- Unreadable ones after it move up by one place.
  call('LSET', items, -place, token)
  call('LREM', items, -1, token)
end
call('ZREMRANGEBYSCORE', times, base_of() + count, '+inf')
call('SET', popped, token .. text, 'PX', {POPPED_MS})
expire(ttl, sliding)
return {{1, text, count - 1}}
"""
)

# ARGV: token, fence; further KEYS: what the SDK keeps beside its items. Gives how many
# items there were.
CLEAR = Script(f"""
local token, fence = ARGV[1], ARGV[2]
local wrong = wrong_kind() or lost(fence)
if wrong then return wrong end
local cleared = call('HGET', notes, 'cleared') or ''
if string.sub(cleared, 1, {TOKEN_LENGTH}) == token then
  return tonumber(string.sub(cleared, {TOKEN_LENGTH} + 1))
end
local count = call('LLEN', items)
local known = call('EXISTS', items, notes) > 0
-- First, because a full server lets a script take away but not add.
call('UNLINK', items, times, popped)
if known then
  call('HSET', notes, 'cleared', token .. count,
    'base', string.format('%d', base_of() + count))
  -- Whoever opens the session anew may begin to count leases anew.
  if fence == '' then call('HDEL', notes, 'fence') end
  call('PEXPIRE', notes, {EMPTY_MS})
end
for index, kind in ipairs({{'hash', 'string'}}) do
  local key = KEYS[4 + index]
  if key and call('TYPE', key).ok == kind then call('UNLINK', key) end
end
return count
""")

# ARGV: the position before or after which to read, "" for none, and how many.
# Gives base, count, the first text's index, the times of batches, and the texts.
PAGE = Script("""
local wrong = wrong_kind()
if wrong then return wrong end
local before, after, limit = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local base, count = base_of(), call('LLEN', items)
local start, stop
if after then
  start = math.min(math.max(after - base, 0), count)
  stop = math.min(start + limit, count)
else
  stop = math.max(math.min(before and before - 1 - base or count, count), 0)
  start = math.max(stop - limit, 0)
end
local first = call('ZREVRANGEBYSCORE', times, base + start + 1, '-inf', 'LIMIT', 0, 1)
local more = call('ZRANGEBYSCORE', times, '(' .. base + start + 1, base + stop)
for _, stamp in ipairs(more) do table.insert(first, stamp) end
local texts = stop > start and call('LRANGE', items, start, stop - 1) or {}
return {base, count, start, first, texts}
""")
