-- wrk script: runs the requests of the script named by WRK_SCRIPT, on one thread, and prints what was
-- answered as one line of JSON, times in ms.
dofile(os.getenv("WRK_SCRIPT"))

statuses = {} -- global, so that the main thread reaches it

local worker

function setup(thread)
  worker = thread
end

function response(status)
  statuses[status] = (statuses[status] or 0) + 1
end

function done(summary, latency)
  local counts = {}
  for status, count in pairs(worker:get("statuses")) do
    counts[#counts + 1] = string.format('"%d":%d', status, count)
  end
  local errors = summary.errors
  print(string.format(
    '{"seconds":%.6f,"p50":%.3f,"p99":%.3f,"statuses":{%s},"broken":%d,"timeouts":%d}',
    summary.duration / 1e6, latency:percentile(50) / 1e3, latency:percentile(99) / 1e3,
    table.concat(counts, ","), errors.connect + errors.read + errors.write, errors.timeout))
end
