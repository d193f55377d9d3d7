-- name: fetch_policies
-- Each policy that the settings ask for beside the one that there is, and what is there besides.
WITH wanted AS (
  SELECT * FROM wanted_policies(
    columnstore_after => %(columnstore_after)s, raw_retention => %(raw_retention)s,
    hourly_retention => %(hourly_retention)s, refresh_start => %(refresh_start)s,
    refresh_end => %(refresh_end)s, refresh_every => %(refresh_every)s,
    quarantine_retention => %(quarantine_retention)s,
    quarantine_bytes_max => %(quarantine_bytes_max)s)
), found AS (
  SELECT s.*, j.config - ARRAY['hypertable_id', 'mat_hypertable_id'] AS config
  FROM job_status s JOIN timescaledb_information.jobs j USING (job_id)
)
SELECT concat_ws(' ', coalesce(w.policy, f.job), coalesce(w.relation, f.relation)) AS title,
       w.config AS wanted, w.every AS wanted_every, f.job_id, f.config, f.schedule_interval AS every,
       f.scheduled
FROM wanted w
FULL JOIN found f ON f.job = w.policy AND coalesce(f.relation, '') = coalesce(w.relation, '')
WHERE w.policy IS NOT NULL OR f.relation IN (SELECT relation FROM wanted)
ORDER BY f.job_id, 1

-- name: fetch_spans
-- How long each class of data is kept and refreshed by the policies that there are. A refresh without
-- a start reaches back to the beginning of time.
SELECT class,
       (SELECT d.time_interval FROM timescaledb_information.dimensions d
        WHERE d.hypertable_schema = 'public'
          AND d.hypertable_name = class || '_telemetry_history') AS chunk,
       max((config ->> 'drop_after')::interval) FILTER (
         WHERE relation = class || '_telemetry_history') AS raw_drop_after,
       max((config ->> 'drop_after')::interval) FILTER (
         WHERE relation = class || '_hourly') AS hourly_drop_after,
       max(start_offset) FILTER (WHERE relation = class || '_hourly') AS hourly_start,
       max(start_offset) FILTER (WHERE relation = class || '_daily') AS daily_start
FROM (VALUES ('meter'), ('vehicle')) AS c (class)
LEFT JOIN (
  SELECT s.relation, j.config,
         CASE WHEN s.job = 'policy_refresh_continuous_aggregate'
              THEN coalesce((j.config ->> 'start_offset')::interval, INTERVAL '1000 years') END
           AS start_offset
  FROM job_status s JOIN timescaledb_information.jobs j USING (job_id)
) p ON p.relation LIKE class || '\_%%'
GROUP BY class ORDER BY class

-- name: fetch_unrolled
-- How many hours of devices that retention would drop are not, or not rightly, rolled up.
SELECT coalesce(sum(unrolled_hours(
         split_part(j.hypertable_name::text, '_', 1),
         %(now)s - (j.config ->> 'drop_after')::interval)), 0)::bigint
FROM timescaledb_information.jobs j
WHERE j.proc_name = 'policy_retention' AND j.hypertable_schema = 'public'
  AND j.hypertable_name IN ('meter_telemetry_history', 'vehicle_telemetry_history')

-- name: fetch_ahead
-- Rollups whose watermark lies ahead. As text: it may be an instant that Python does not know.
SELECT a.user_view_name::text, _timescaledb_functions.to_timestamp(w.watermark)::text
FROM _timescaledb_catalog.continuous_aggs_watermark w
JOIN _timescaledb_catalog.continuous_agg a USING (mat_hypertable_id)
WHERE a.user_view_schema = 'public'
  AND w.watermark > _timescaledb_functions.to_unix_microseconds(%(now)s::timestamptz)
ORDER BY 1

-- name: fetch_row_chunks
-- Chunks of rows that should be in columns by now: the policy comes by every six hours, and may miss
-- once.
SELECT hypertable_name::text, count(*), min(range_start)
FROM timescaledb_information.chunks
WHERE hypertable_schema = 'public'
  AND hypertable_name IN ('meter_telemetry_history', 'vehicle_telemetry_history')
  AND NOT is_compressed
  AND range_end < %(now)s - %(columnstore_after)s::interval - INTERVAL '12 hours'
GROUP BY 1 ORDER BY 1

-- name: fetch_role_attributes
SELECT r.rolname::text, a.name
FROM pg_roles r, LATERAL (VALUES
  ('SUPERUSER', r.rolsuper), ('CREATEDB', r.rolcreatedb), ('CREATEROLE', r.rolcreaterole),
  ('REPLICATION', r.rolreplication), ('BYPASSRLS', r.rolbypassrls)) AS a (name, is_set)
WHERE r.rolname IN ('energy_reader', 'energy_ingest') AND a.is_set
ORDER BY 1, 2

-- name: fetch_memberships
SELECT r.rolname::text, g.rolname::text
FROM pg_auth_members m JOIN pg_roles r ON r.oid = m.member JOIN pg_roles g ON g.oid = m.roleid
WHERE r.rolname IN ('energy_reader', 'energy_ingest')
ORDER BY 1, 2

-- name: fetch_skewed
-- Devices whose readings come whole hours after they were read, each of the last five: a clock in
-- local time. A backlog that was sent at once looks otherwise: each of its readings is late by another span.
WITH live AS (
  SELECT 'meter' AS class, meter_id AS device_id, ts, received_at FROM meter_live_status
  UNION ALL
  SELECT 'vehicle', vehicle_id, ts, received_at FROM vehicle_live_status
), candidate AS (
  SELECT *, round(extract(epoch FROM received_at - ts) / 3600)::int AS hours
  FROM live
  WHERE received_at > %(now)s - INTERVAL '1 day'
    AND received_at - ts BETWEEN INTERVAL '58 minutes' AND INTERVAL '14 hours 2 minutes'
)
SELECT device_id, hours
FROM candidate c, LATERAL (
  SELECT count(*) AS readings,
         max(abs(extract(epoch FROM r.received_at - r.ts) - 3600 * hours)) AS seconds_off
  FROM (
    (SELECT ts, received_at FROM meter_telemetry_history h
     WHERE c.class = 'meter' AND h.meter_id = c.device_id
       AND h.ts > c.ts - INTERVAL '1 day' AND h.ts <= c.ts ORDER BY ts DESC LIMIT 5)
    UNION ALL
    (SELECT ts, received_at FROM vehicle_telemetry_history h
     WHERE c.class = 'vehicle' AND h.vehicle_id = c.device_id
       AND h.ts > c.ts - INTERVAL '1 day' AND h.ts <= c.ts ORDER BY ts DESC LIMIT 5)
  ) r
) recent
WHERE readings >= 3 AND seconds_off <= 120
ORDER BY hours DESC, device_id

-- name: fetch_in_future
-- Devices whose readings were refused as ahead of time within a day, each with the newest of these.
SELECT DISTINCT ON (device_id)
       device_id, sum(count) OVER (PARTITION BY device_id)::bigint AS readings,
       substring(payload FROM 1 FOR 4096) AS payload, first_seen
FROM quarantine
WHERE code = 'in_future' AND device_id IS NOT NULL AND last_seen > %(now)s - INTERVAL '1 day'
ORDER BY device_id, first_seen DESC

-- name: fetch_silent
-- How many devices of each class were ever heard, are silent, and are silent for so long that they
-- are held to be retired; the longest silent ones. Old readings that were imported are of no device
-- that is expected to go on.
WITH heard AS (
  SELECT 'meters' AS class, l.meter_id AS device_id, l.ts, l.received_at, d.reporting_interval
  FROM meter_live_status l LEFT JOIN meter d USING (meter_id)
  UNION ALL
  SELECT 'vehicles', l.vehicle_id, l.ts, l.received_at, d.reporting_interval
  FROM vehicle_live_status l LEFT JOIN vehicle d USING (vehicle_id)
), judged AS (
  SELECT *,
         %(now)s - least(ts, received_at) > INTERVAL '30 days' AS is_retired,
         %(now)s - received_at
           > greatest(3 * coalesce(reporting_interval, '0'), INTERVAL '10 minutes') AS is_silent
  FROM heard
)
SELECT class, count(*) AS heard,
       count(*) FILTER (WHERE is_silent AND NOT is_retired) AS silent,
       count(*) FILTER (WHERE is_silent AND is_retired) AS retired,
       (array_agg(device_id ORDER BY received_at, device_id)
          FILTER (WHERE is_silent AND NOT is_retired))[1:5] AS longest,
       (array_agg(received_at ORDER BY received_at, device_id)
          FILTER (WHERE is_silent AND NOT is_retired))[1:5] AS longest_since
FROM judged GROUP BY class ORDER BY class
