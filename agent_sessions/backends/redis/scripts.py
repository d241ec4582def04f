"""What the server does in one step: Lua, run by its digest; and how it is sent.

KEYS are Names.keys: the list of items, the notes (a hash), the times (a sorted set:
where each batch begins -> "position:milliseconds"), the calls (a sorted set: the token
of each write -> when it was first sent, in milliseconds) and the answers (a hash: the
token of a pop or clear -> what it was told); then, where they matter, the two that the
SDK keeps beside its items, which expire with these. Notes:

- `base`: how many items were trimmed or cleared before the list's first one, so that
  positions stay what they were;
- `fence`: the newest lease that a run has come with.

A client sends a command again when its connection breaks, though the first may have
arrived. Each write is done once: a token that is known does nothing and gets the answer
of the first time. A write that was first sent longer than ACCEPTED_MS ago, by the
server's clock, is refused, so tokens needn't be kept for ever. They are kept so much
longer (KEPT_MS) that a client which is refused, and tried no longer than SENDING_S,
knows that none of its tries was done.

Every script looks at the kinds of keys and at the fence before it writes, and Redis
refuses a script for lack of memory before its first write: nothing is half-written.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from agent_sessions.backends.redis.clients import is_cluster
from agent_sessions.backends.redis.errors import TOO_LATE, CallTooLate, unanswered

if TYPE_CHECKING:
    from redis.asyncio import Redis, RedisCluster

# For how many seconds a client goes on sending one call.
SENDING_S = 60
# How old, or how far in the future, a call may be that is done, in milliseconds.
ACCEPTED_MS = 60_000
# For how long a token is known: what was accepted is known to each later try.
KEPT_MS = ACCEPTED_MS + 2 * SENDING_S * 1000
# For how long positions of a session without items are remembered.
EMPTY_MS = 600_000
# Ends the texts that are written here, which are readable for certain: a pop needn't
# ask. To a reader of JSON it is nothing.
MARK = "\t "
_TOKEN_BYTES = 8

_PRELUDE = f"""
local items, notes, times, calls, answers = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local call = redis.call

local function wrong_kind()
  local kinds = {{'list', 'hash', 'zset', 'zset', 'hash'}}
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

local function clock()
  local now = call('TIME')
  return now[1] * 1000 + math.floor(now[2] / 1000)
end

-- Whether a call was done before; an error where it is too old to be done.
local function is_done(token, stamp)
  if call('ZSCORE', calls, token) then return true end
  local now = clock()
  if math.abs(now - tonumber(stamp)) > {ACCEPTED_MS} then
    return redis.error_reply(string.format('{TOO_LATE} %.0f', now))
  end
end

-- Remember a call; what is too old to be asked for again goes.
local function done(token, stamp, answer)
  local over = call('ZRANGEBYSCORE', calls, '-inf',
    string.format('(%.0f', clock() - {KEPT_MS}), 'LIMIT', 0, 1000)
  for _, old in ipairs(over) do
    call('ZREM', calls, old)
    call('HDEL', answers, old)
  end
  call('ZADD', calls, stamp, token)
  call('PEXPIRE', calls, {KEPT_MS + ACCEPTED_MS})
  if answer then
    call('HSET', answers, token, answer)
    call('PEXPIRE', answers, {KEPT_MS + ACCEPTED_MS})
  end
end

local function base_of()
  return tonumber(call('HGET', notes, 'base') or 0)
end

-- What was popped is part of the history that goes.
local function forget_popped()
  for _, token in ipairs(call('HKEYS', answers)) do
    if string.sub(token, 1, 1) == 'p' then call('HDEL', answers, token) end
  end
end

local function expire(ttl, sliding)
  if ttl > 0 and (sliding == '1' or call('PTTL', items) == -1) then
    call('PEXPIRE', items, ttl)
  end
  local left = call('PTTL', items)
  if ttl > 0 then
    for index, kind in ipairs({{'hash', 'string'}}) do
      local key = KEYS[5 + index]
      if key and call('TYPE', key).ok == kind then
        call('PEXPIRE', key, left > 0 and left or ttl)
      end
    end
  end
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


# ARGV: token, when it was first sent, fence, ttl in ms, whether it slides, how many items
# are kept, whether those that are there go, items … Returns how many items there are.
APPEND = Script("""
local token, stamp, fence, ttl = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4])
local sliding, most, goes, first = ARGV[5], tonumber(ARGV[6]), ARGV[7] == '1', 8
local wrong = wrong_kind()
if wrong then return wrong end
local count, before = call('LLEN', items), is_done(token, stamp)
if before == true then return count end
wrong = before or lost(fence)
if wrong then return wrong end
local base, left = base_of(), call('PTTL', items)
if goes then
  call('UNLINK', items, times)
  forget_popped()
  base, count = base + count, 0
  call('HSET', notes, 'base', string.format('%d', base))
end
-- First, because a full server refuses this, and nothing after a script's first write.
for start = first, #ARGV, 1000 do
  call('RPUSH', items, unpack(ARGV, start, math.min(start + 999, #ARGV)))
end
if goes and left > 0 then call('PEXPIRE', items, left) end
local position = string.format('%d', base + count + 1)
-- Others, such as the SDK, take items away without a word about their times.
call('ZREMRANGEBYSCORE', times, position, '+inf')
call('ZADD', times, position, position .. ':' .. string.format('%.0f', clock()))
done(token, stamp)
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

# ARGV: fence, ttl in ms, whether it slides, how many of the newest. Returns their texts.
# A server that refuses writes, such as a replica, is read all the same.
LATEST = Script("""
local wrong = wrong_kind()
if wrong then return wrong end
call = redis.pcall
wrong = lost(ARGV[1])
if wrong then return wrong end
if ARGV[3] == '1' or ARGV[1] ~= '' then
  expire(ARGV[3] == '1' and tonumber(ARGV[2]) or 0, ARGV[3])
end
return call('LRANGE', items, '-' .. ARGV[4], -1)
""")

# ARGV: token, when it was first sent, fence, ttl in ms, whether it slides, how many texts
# to return where the newest has no mark, and of the one that the caller chose among these:
# its place from the end (0: none yet, -1: all are to be looked at), how many items there
# were, its text.
# Returns 1, the text and how many are left; or 0 and the newest texts, to choose from.
POP = Script(f"""
local token, stamp, fence, ttl = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4])
local sliding, window, place = ARGV[5], ARGV[6], tonumber(ARGV[7])
local mark = '{MARK}'
local wrong = wrong_kind()
if wrong then return wrong end
local count, before = call('LLEN', items), is_done(token, stamp)
if before == true then
  -- A clear takes the text along.
  return {{1, call('HGET', answers, token) or '', count}}
end
wrong = before or lost(fence)
if wrong then return wrong end
local text = call('LINDEX', items, -math.max(place, 1))
if not text then return {{0, count, {{}}}} end
if place > 0 and not (count == tonumber(ARGV[8]) and text == ARGV[9])
  or place < 0 or place == 0 and string.sub(text, -#mark) ~= mark then
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
done(token, stamp, text)
expire(ttl, sliding)
return {{1, text, count - 1}}
""")

# ARGV: token, when it was first sent, fence. Returns how many items there were.
CLEAR = Script(f"""
local token, stamp, fence = ARGV[1], ARGV[2], ARGV[3]
local wrong = wrong_kind()
if wrong then return wrong end
local before = is_done(token, stamp)
if before == true then return tonumber(call('HGET', answers, token)) end
wrong = before or lost(fence)
if wrong then return wrong end
local count = call('LLEN', items)
local known = call('EXISTS', items, notes) > 0
-- First, because a full server lets a script take away but not add.
call('UNLINK', items, times)
forget_popped()
done(token, stamp, count)
if known then
  call('HSET', notes, 'base', string.format('%d', base_of() + count))
  -- Whoever opens the session anew may begin to count leases anew.
  if fence == '' then call('HDEL', notes, 'fence') end
  call('PEXPIRE', notes, {EMPTY_MS})
end
for index, kind in ipairs({{'hash', 'string'}}) do
  local key = KEYS[5 + index]
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


def needs_sdk_keys(script: Script, ttl: int) -> bool:
    """Return whether a script needs the keys that the SDK keeps beside its items."""
    if not ttl:
        return script is CLEAR
    # There they expire with the items.
    return script in {APPEND, LATEST, POP, CLEAR}


# -- what is sent ------------------------------------------------------------------------

# Sends a script with a call's token and time.
_Send = Callable[[tuple[bytes, int]], Awaitable[Any]]


class Calls:
    """The writes of one backend, each of which is done once."""

    def __init__(self, alias: str) -> None:
        self.alias = alias
        # How far the server's clock is ahead of this one. The server has the last word.
        self.ahead_ms = 0

    async def make(self, send: _Send, *, pops: bool = False) -> Any:
        """Send a call until it is answered.

        Raises StoreUnavailable where the server doesn't answer in time.
        """
        try:
            return await self._make(send, pops)
        except CallTooLate as exc:
            # The clocks differ. None of its tries was done, so another call may be.
            self.ahead_ms = exc.server_ms - _now_ms()
            return await self._make(send, pops)

    async def _make(self, send: _Send, pops: bool) -> Any:
        token = (b"p" if pops else b"w") + os.urandom(_TOKEN_BYTES)
        try:
            async with asyncio.timeout(SENDING_S):
                return await send((token, _now_ms() + self.ahead_ms))
        except TimeoutError as exc:
            raise unanswered(self.alias, SENDING_S) from exc


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


async def evaluate(
    client: Redis | RedisCluster, script: Script, keys: Sequence[bytes], args: Any
) -> Any:
    """Run a script by its digest, and with its text where the server lacks it.

    Answers stay bytes, whatever the client decodes: some texts may be no UTF-8.
    """
    from redis.exceptions import NoScriptError

    rest = (len(keys), *keys, *args)
    try:
        return await client.execute_command(
            "EVALSHA", script.digest, *rest, NEVER_DECODE=True
        )
    except NoScriptError:
        return await client.execute_command(
            "EVAL", script.text, *rest, NEVER_DECODE=True
        )


async def scan(client: Any, match: bytes) -> AsyncIterator[bytes]:
    """Return the names that match, from every primary of a cluster."""
    targets: list[dict[str, Any]] = [{}]
    if is_cluster(client):
        targets = [{"target_nodes": node} for node in client.get_primaries()]
    for target in targets:
        cursor: Any = 0
        while True:
            found = await client.execute_command(
                *("SCAN", cursor, "MATCH", match, "COUNT", 1000, "TYPE", "list"),
                **target,
                NEVER_DECODE=True,
            )
            cursor, names = found
            if isinstance(cursor, dict):
                # A cluster's is told by the node's name.
                [cursor] = cursor.values()
            for name in names:
                yield name
            if not int(cursor):
                break
