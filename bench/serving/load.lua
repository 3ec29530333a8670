-- For wrk: sends the requests of a file in turn and counts answers by status, and those that are not the right ones.
--   wrk -t 32 -c 32 -d 10s --latency -s load.lua http://127.0.0.1:3000/predict -- FILE [check]
-- Answers are compared only with `check`, and only with one connection a thread (-t and -c equal), because only then
-- is an answer that of the last request. Checking takes time from the server on the same cores.

local threads = {}

function setup(thread)
  thread:set("number", #threads)
  table.insert(threads, thread)
end

function init(args)
  requests, answers = {}, {}
  for line in io.lines(args[1]) do
    local request, answer = line:match("^(.-)\t(.*)$")
    requests[#requests + 1] = wrk.format("POST", nil, { ["Content-Type"] = "application/json" }, request)
    answers[#answers + 1] = answer
  end
  check = args[2] == "check"
  -- Threads begin at different places; each goes round.
  place = (number * 997) % #requests
  good, wrong, overloaded, other = 0, 0, 0, 0
  if not check then response = nil end
end

function request()
  place = place % #requests + 1
  return requests[place]
end

function response(status, headers, body)
  if status == 429 then
    overloaded = overloaded + 1
  elseif status ~= 200 then
    other = other + 1
  elseif body ~= answers[place] then
    wrong = wrong + 1
  else
    good = good + 1
  end
end

function done(summary, latency, requests)
  local sum = { good = 0, wrong = 0, overloaded = 0, other = 0 }
  for _, thread in ipairs(threads) do
    for name in pairs(sum) do sum[name] = sum[name] + (thread:get(name) or 0) end
  end
  local e = summary.errors
  print(string.format(
    '{"requests": %d, "requests_per_s": %.0f, "p50_ms": %.2f, "p99_ms": %.2f, "max_ms": %.2f, "not_2xx": %d, ' ..
    '"connect": %d, "read": %d, "write": %d, "timeout": %d, "checked": %d, "wrong": %d, "overloaded": %d, "other": %d}',
    summary.requests, summary.requests / summary.duration * 1e6, latency:percentile(50) / 1e3,
    latency:percentile(99) / 1e3, latency.max / 1e3, e.status, e.connect, e.read, e.write, e.timeout,
    sum.good + sum.wrong, sum.wrong, sum.overloaded, sum.other))
end
