"""What lies in Redis, and what the server does with it in one step: Lua scripts.

Items lie where the SDK's RedisSession keeps them, so that its histories open and it
can read ours: `<prefix>:<id>:messages`. Whatever else is kept of a session lies beside
it, in the same slot of a cluster. Names of owned sessions hold the alias and the owner,
and can't be the name of a session without one. Those of a backend that another one
wraps hold that one's alias, also without an owner.

Scripts are run by their digest. Their KEYS are Names.keys: the list of items, the notes
(a hash), the times (a sorted set: where each batch begins -> "position:milliseconds"),
the calls (a sorted set: the token of each write -> when it was done, in milliseconds)
and the answers (a hash: the token of a pop or clear -> what it was told);
then, where they matter, the two that the SDK keeps beside its items, which expire with
these. Notes:

- `base`: how many items were trimmed or cleared before the list's first one, so that
  positions stay what they were;
- `fence`: the newest lease that a run has come with.

A client sends a command again when its connection breaks, though the first may have
arrived. Each write is done once: a token that is known does nothing and gets the answer
of the first time. Tokens are kept for KEPT_MS, three times as long as a client tries.

Every script looks at the kinds of keys and at the fence before it writes, and Redis
refuses a script for lack of memory before its first write: nothing is half-written.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import chain, count
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

if TYPE_CHECKING:
    from redis.asyncio import Redis, RedisCluster

# For how many seconds a client goes on sending one call.
SENDING_S = 60
# For how long a token is known, in milliseconds.
KEPT_MS = 3 * SENDING_S * 1000
# For how long positions of a session without items are remembered.
EMPTY_MS = 600_000
# Ends the texts that are written here, which are readable for certain: a pop needn't
# ask. To a reader of JSON it is nothing.
MARK = "\t "
ITEMS = ":messages"
OWNED = "-of:"
WRAPPED = "-in:"
_BESIDE = (b":notes", b":times", b":calls", b":answers")


@dataclass(frozen=True)
class Names:
    """The keys of one session. `prefix` is the SDK's `key_prefix`."""

    prefix: str
    session_id: str
    alias: str = ""
    user_id: Any = None
    # The alias that wraps the backend, and a mark of the directory's database.
    namespace: str = ""

    @cached_property
    def stem(self) -> str:
        """What the key of the items begins with."""
        if self.user_id is None:
            return f"{unowned(self.prefix, self.namespace)}:{self.session_id}"
        # Quoted, so that neither an alias nor a text key runs into what follows.
        alias, user = quote(self.alias, safe=""), quote(str(self.user_id), safe="")
        return f"{self.prefix}{OWNED}{alias}:{user}:{self.session_id}"

    @cached_property
    def items(self) -> bytes:
        return f"{self.stem}{ITEMS}".encode()

    @cached_property
    def keys(self) -> tuple[bytes, ...]:
        """The keys that scripts take: items, notes, times, calls and answers."""
        return self.items, *_beside(self.items)

    @property
    def sdk_keys(self) -> tuple[bytes, ...]:
        """What the SDK keeps of a session beside its items; in slots of their own."""
        if self.user_id is not None or self.namespace:
            return ()
        return self.stem.encode(), f"{self.stem}:counter".encode()


def unowned(prefix: str, namespace: str) -> str:
    """Return what the names of sessions without an owner begin with."""
    return f"{prefix}{WRAPPED}{quote(namespace, safe='')}" if namespace else prefix


def pattern(prefix: str) -> str:
    escaped = "".join(f"\\{c}" if c in "*?[]\\^-" else c for c in prefix)
    return f"{escaped}:*{ITEMS}"


def id_of(prefix: str, name: bytes | str) -> str | None:
    """Return whose items lie under a name; None where it is no session's."""
    try:
        text = name if isinstance(name, str) else name.decode()
    except UnicodeDecodeError:
        return None
    found = text.removeprefix(f"{prefix}:").removesuffix(ITEMS)
    return found if found and f"{prefix}:{found}{ITEMS}" == text else None


@lru_cache(maxsize=1024)
def _beside(items: bytes) -> tuple[bytes, ...]:
    """Return the names of the other keys, in the slot of the items' key.

    They begin as that does, so a rule of the server for the prefix, such as an ACL, is
    a rule for all of them.
    """
    from redis.crc import key_slot

    slot = key_slot(items)
    # The first tag in braces counts, and without one the whole name; where the id's
    # own braces are in the way, a number fits by chance.
    return tuple(
        next(
            name
            for name in chain(
                (items + suffix, items + b":{" + items + b"}" + suffix),
                (items + suffix + b":%d" % number for number in count()),
            )
            if key_slot(name) == slot
        )
        for suffix in _BESIDE
    )


# All scripts begin so. ARGV: token, fence, ttl in ms, whether it slides, and what the
# script says. Reads have no token.
_BEGIN = f"""
local items, notes, times, calls, answers = unpack(KEYS, 1, 5)
local token, fence = ARGV[1], ARGV[2]
local ttl, sliding = tonumber(ARGV[3] or 0), ARGV[4] == '1'
local call = redis.call

for index, kind in ipairs({{'list', 'hash', 'zset', 'zset', 'hash'}}) do
  local found = call('TYPE', KEYS[index]).ok
  if found ~= 'none' and found ~= kind then
    return redis.error_reply('WRONGTYPE a session key holds a ' .. found)
  end
end
local time = call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local count = call('LLEN', items)
local base = tonumber(call('HGET', notes, 'base') or 0)
-- Whether the call was done before.
local known = token ~= '' and call('ZSCORE', calls, token)
if token == '' then
  -- A server that refuses writes, such as a replica, is read all the same.
  call = redis.pcall
end
if fence ~= '' and not known then
  local newest = tonumber(call('HGET', notes, 'fence') or -1)
  if tonumber(fence) < newest then return redis.error_reply('LEASELOST') end
  if tonumber(fence) > newest then call('HSET', notes, 'fence', fence) end
end

-- Remember the call; what is too old to be asked for again goes.
local function remember(answer)
  local over = call('ZRANGEBYSCORE', calls, '-inf',
    string.format('(%.0f', now - {KEPT_MS}), 'LIMIT', 0, 1000)
  if #over > 0 then
    call('ZREM', calls, unpack(over))
    call('HDEL', answers, unpack(over))
  end
  call('ZADD', calls, now, token)
  if answer then call('HSET', answers, token, answer) end
  for _, key in ipairs({{calls, answers}}) do
    call('PEXPIRE', key, {KEPT_MS})
  end
end

local function move_base(by)
  base = base + by
  call('HSET', notes, 'base', string.format('%d', base))
end

-- What was popped is part of the history that goes.
local function unlink_all()
  call('UNLINK', items, times)
  for _, each in ipairs(call('HKEYS', answers)) do
    if string.sub(each, 1, 1) == 'p' then call('HDEL', answers, each) end
  end
end

local function with_sdk_keys(command, ...)
  for index, kind in ipairs({{'hash', 'string'}}) do
    local key = KEYS[5 + index]
    if key and call('TYPE', key).ok == kind then call(command, key, ...) end
  end
end

local function expire()
  if ttl > 0 and (sliding or call('PTTL', items) == -1) then
    call('PEXPIRE', items, ttl)
  end
  local left = call('PTTL', items)
  if ttl > 0 then with_sdk_keys('PEXPIRE', left > 0 and left or ttl) end
  if left == -2 then left = {EMPTY_MS} end
  for _, key in ipairs({{notes, times}}) do
    if left > 0 then call('PEXPIRE', key, left) else call('PERSIST', key) end
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
        text = (_BEGIN + self.body).encode()
        digest = hashlib.sha1(text, usedforsecurity=False).hexdigest().encode()
        object.__setattr__(self, "text", text)
        object.__setattr__(self, "digest", digest)


# ARGV: how many items are kept, whether those that are there go, items … Returns how
# many items there are.
APPEND = Script("""
if known then return count end
local most, goes, first = tonumber(ARGV[5]), ARGV[6] == '1', 7
local left = call('PTTL', items)
if goes then
  unlink_all()
  move_base(count)
  count = 0
end
-- First, because a full server refuses this, and nothing after a script's first write.
for start = first, #ARGV, 1000 do
  call('RPUSH', items, unpack(ARGV, start, math.min(start + 999, #ARGV)))
end
if goes and left > 0 then call('PEXPIRE', items, left) end
local position = string.format('%d', base + count + 1)
-- Others, such as the SDK, take items away without a word about their times.
call('ZREMRANGEBYSCORE', times, position, '+inf')
call('ZADD', times, position, position .. ':' .. string.format('%.0f', now))
remember()
count = count + #ARGV - first + 1
if most > 0 and count > most then
  call('LTRIM', items, -most, -1)
  move_base(count - most)
  count = most
  local kept = call('ZREVRANGEBYSCORE', times, base + 1, '-inf',
    'WITHSCORES', 'LIMIT', 0, 1)
  if kept[2] then call('ZREMRANGEBYSCORE', times, '-inf', '(' .. kept[2]) end
end
expire()
return count
""")

# ARGV: how many of the newest. Returns their texts.
LATEST = Script("""
expire()
return call('LRANGE', items, '-' .. ARGV[5], -1)
""")

# ARGV: how many texts to return where the newest has no mark, and of the one that the
# caller chose among these: its place from the end (0: none yet, -1: all are to be looked
# at), how many items there were, its text.
# Returns 1, the text and how many are left; or 0 and the newest texts, to choose from.
POP = Script(f"""
-- A clear takes the text along.
if known then return {{1, call('HGET', answers, token) or '', count}} end
local window, place, mark = ARGV[5], tonumber(ARGV[6]), '{MARK}'
local text = call('LINDEX', items, -math.max(place, 1))
if not text then return {{0, count, {{}}}} end
if place > 0 and not (count == tonumber(ARGV[7]) and text == ARGV[8])
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
call('ZREMRANGEBYSCORE', times, base + count, '+inf')
remember(text)
expire()
return {{1, text, count - 1}}
""")

# Returns how many items there were.
CLEAR = Script(f"""
if known then return tonumber(call('HGET', answers, token)) end
local is_there = call('EXISTS', items, notes) > 0
-- First, because a full server lets a script take away but not add.
unlink_all()
remember(count)
if is_there then
  move_base(count)
  -- Whoever opens the session anew may begin to count leases anew.
  if fence == '' then call('HDEL', notes, 'fence') end
  call('PEXPIRE', notes, {EMPTY_MS})
end
with_sdk_keys('UNLINK')
return count
""")

# ARGV: the position before or after which to read, "" for none, and how many.
# Gives base, count, the first text's index, the times of batches, and the texts.
PAGE = Script("""
local before, after, limit = tonumber(ARGV[5]), tonumber(ARGV[6]), tonumber(ARGV[7])
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
