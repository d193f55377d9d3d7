-- The statements of the writer. A batch crosses the wire as one array per column.

-- name: insert_meter_readings
-- Add to history, move the live rows forward, register the devices that were not heard before. Sorted,
-- so that two writers lock in one order. A reading that a correction took out stays out.
--
-- Returns positions (from 1): of those that were not inserted, and of those that were, but have to be
-- judged: late ones, and ones that do not fit to the reading before them, which is of this batch or was
-- the live row; all of a device where another writer has moved its live row since the snapshot. The
-- tests here may only be stricter than those of implausibilities().
WITH incoming AS MATERIALIZED (
  SELECT * FROM unnest(
    %(meter_id)s::text[], %(ts)s::timestamptz[], %(kwh_consumed_ac)s::float8[], %(voltage)s::float8[])
  WITH ORDINALITY AS r (meter_id, ts, kwh_consumed_ac, voltage, position)
), stored AS (
  INSERT INTO meter_telemetry_history (meter_id, ts, kwh_consumed_ac, voltage, received_at)
  SELECT meter_id, ts, kwh_consumed_ac, voltage, %(received_at)s FROM incoming i
  WHERE NOT EXISTS (
    SELECT FROM corrected_meter_reading c WHERE c.meter_id = i.meter_id AND c.ts = i.ts)
  ORDER BY meter_id, ts
  ON CONFLICT DO NOTHING
  RETURNING *
), live AS (
  INSERT INTO meter_live_status AS live (meter_id, ts, kwh_consumed_ac, voltage, received_at)
  SELECT DISTINCT ON (meter_id) meter_id, ts, kwh_consumed_ac, voltage, received_at
  FROM stored ORDER BY meter_id, ts DESC
  ON CONFLICT (meter_id) DO UPDATE
  SET ts = excluded.ts, kwh_consumed_ac = excluded.kwh_consumed_ac, voltage = excluded.voltage,
      received_at = excluded.received_at, previous_ts = live.ts
  WHERE live.ts < excluded.ts
  RETURNING meter_id, xmax = 0 AS first_heard,
            previous_ts IS DISTINCT FROM (
              SELECT was.ts FROM meter_live_status was WHERE was.meter_id = live.meter_id) AS is_raced
), registered AS (
  INSERT INTO meter (meter_id) SELECT meter_id FROM live WHERE first_heard ORDER BY meter_id
  ON CONFLICT DO NOTHING
), paired AS (
  SELECT s.meter_id, s.ts, s.kwh_consumed_ac AS kwh, was.ts > s.ts AS is_late,
         coalesce(lag(s.ts) OVER w, was.ts) AS previous_ts,
         coalesce(lag(s.kwh_consumed_ac) OVER w, was.kwh_consumed_ac) AS previous_kwh,
         coalesce(lag(s.received_at) OVER w, was.received_at) AS previous_received_at
  FROM stored s LEFT JOIN meter_live_status was ON was.meter_id = s.meter_id
  WINDOW w AS (PARTITION BY s.meter_id, was.ts > s.ts ORDER BY s.ts)
), judged AS (
  SELECT p.meter_id, p.ts,
         p.is_late OR p.meter_id NOT IN (SELECT l.meter_id FROM live l WHERE NOT l.is_raced)
         OR p.ts <= %(received_at)s - INTERVAL '58 minutes'
            AND clock_hours_behind(p.ts, %(received_at)s, p.previous_ts, p.previous_received_at) > 0
         OR p.previous_ts IS NOT NULL
            AND (p.kwh > plausible_kwh(l.power, p.ts - p.previous_ts, '0') OR p.kwh > l.step)
            AND NOT coalesce((
              SELECT CASE d.energy_kind
                WHEN 'register' THEN p.kwh >= p.previous_kwh
                  AND coalesce(p.kwh - p.previous_kwh <= plausible_kwh(
                        l.power, p.ts - p.previous_ts, d.reporting_interval), true)
                  AND coalesce(p.kwh - p.previous_kwh <= l.step, true)
                ELSE coalesce(p.kwh <= plausible_kwh(
                       l.power, p.ts - p.previous_ts, d.reporting_interval), true) END
              FROM meter d WHERE d.meter_id = p.meter_id), false)
         AS is_doubtful
  FROM paired p CROSS JOIN (
    SELECT least(power_kw_soft, power_kw_hard) AS power, least(step_kwh_soft, step_kwh_hard) AS step
    FROM (VALUES ('meter')) AS c (device_class) LEFT JOIN plausibility_limit USING (device_class)) l
)
SELECT i.position, j.ts IS NOT NULL AS is_stored
FROM incoming i LEFT JOIN judged j ON j.meter_id = i.meter_id AND j.ts = i.ts
WHERE j.ts IS NULL OR j.is_doubtful

-- name: insert_vehicle_readings
-- The same for vehicles.
WITH incoming AS MATERIALIZED (
  SELECT * FROM unnest(
    %(vehicle_id)s::text[], %(ts)s::timestamptz[], %(soc)s::float8[], %(kwh_delivered_dc)s::float8[],
    %(battery_temp)s::float8[])
  WITH ORDINALITY AS r (vehicle_id, ts, soc, kwh_delivered_dc, battery_temp, position)
), stored AS (
  INSERT INTO vehicle_telemetry_history
    (vehicle_id, ts, soc, kwh_delivered_dc, battery_temp, received_at)
  SELECT vehicle_id, ts, soc, kwh_delivered_dc, battery_temp, %(received_at)s FROM incoming i
  WHERE NOT EXISTS (
    SELECT FROM corrected_vehicle_reading c WHERE c.vehicle_id = i.vehicle_id AND c.ts = i.ts)
  ORDER BY vehicle_id, ts
  ON CONFLICT DO NOTHING
  RETURNING *
), live AS (
  INSERT INTO vehicle_live_status AS live
    (vehicle_id, ts, soc, kwh_delivered_dc, battery_temp, received_at)
  SELECT DISTINCT ON (vehicle_id) vehicle_id, ts, soc, kwh_delivered_dc, battery_temp, received_at
  FROM stored ORDER BY vehicle_id, ts DESC
  ON CONFLICT (vehicle_id) DO UPDATE
  SET ts = excluded.ts, soc = excluded.soc, kwh_delivered_dc = excluded.kwh_delivered_dc,
      battery_temp = excluded.battery_temp, received_at = excluded.received_at,
      previous_ts = live.ts
  WHERE live.ts < excluded.ts
  RETURNING vehicle_id, xmax = 0 AS first_heard,
            previous_ts IS DISTINCT FROM (
              SELECT was.ts FROM vehicle_live_status was WHERE was.vehicle_id = live.vehicle_id) AS is_raced
), registered AS (
  INSERT INTO vehicle (vehicle_id) SELECT vehicle_id FROM live WHERE first_heard ORDER BY vehicle_id
  ON CONFLICT DO NOTHING
), paired AS (
  SELECT s.vehicle_id, s.ts, s.kwh_delivered_dc AS kwh, s.soc, s.battery_temp, was.ts > s.ts AS is_late,
         coalesce(lag(s.ts) OVER w, was.ts) AS previous_ts,
         coalesce(lag(s.kwh_delivered_dc) OVER w, was.kwh_delivered_dc) AS previous_kwh,
         coalesce(lag(s.soc) OVER w, was.soc) AS previous_soc,
         coalesce(lag(s.battery_temp) OVER w, was.battery_temp) AS previous_temp,
         coalesce(lag(s.received_at) OVER w, was.received_at) AS previous_received_at
  FROM stored s LEFT JOIN vehicle_live_status was ON was.vehicle_id = s.vehicle_id
  WINDOW w AS (PARTITION BY s.vehicle_id, was.ts > s.ts ORDER BY s.ts)
), judged AS (
  SELECT p.vehicle_id, p.ts,
         p.is_late OR p.vehicle_id NOT IN (SELECT l.vehicle_id FROM live l WHERE NOT l.is_raced)
         OR p.ts <= %(received_at)s - INTERVAL '58 minutes'
            AND clock_hours_behind(p.ts, %(received_at)s, p.previous_ts, p.previous_received_at) > 0
         OR p.previous_ts IS NOT NULL
            AND (p.kwh > plausible_kwh(l.power, p.ts - p.previous_ts, '0') OR p.kwh > l.step)
            AND NOT coalesce((
              SELECT CASE d.energy_kind
                WHEN 'register' THEN p.kwh >= p.previous_kwh
                  AND coalesce(p.kwh - p.previous_kwh <= plausible_kwh(
                        l.power, p.ts - p.previous_ts, d.reporting_interval), true)
                  AND coalesce(p.kwh - p.previous_kwh <= l.step, true)
                ELSE coalesce(p.kwh <= plausible_kwh(
                       l.power, p.ts - p.previous_ts, d.reporting_interval), true) END
              FROM vehicle d WHERE d.vehicle_id = p.vehicle_id), false)
         OR abs(p.soc - p.previous_soc) > plausible_change(l.soc_rate, p.ts - p.previous_ts)
         OR abs(p.battery_temp - p.previous_temp) > plausible_change(l.temp_rate, p.ts - p.previous_ts)
         AS is_doubtful
  FROM paired p CROSS JOIN (
    SELECT least(power_kw_soft, power_kw_hard) AS power, least(step_kwh_soft, step_kwh_hard) AS step,
           least(soc_rate_soft, soc_rate_hard) AS soc_rate,
           least(temp_rate_soft, temp_rate_hard) AS temp_rate
    FROM (VALUES ('vehicle')) AS c (device_class) LEFT JOIN plausibility_limit USING (device_class)) l
)
SELECT i.position, j.ts IS NOT NULL AS is_stored
FROM incoming i LEFT JOIN judged j ON j.vehicle_id = i.vehicle_id AND j.ts = i.ts
WHERE j.ts IS NULL OR j.is_doubtful

-- name: fetch_refusals
-- Which of the readings just inserted break a hard limit, by position.
SELECT position, code, detail FROM implausible_beyond_limits(
  %(device_class)s, %(device_ids)s::text[], %(ts)s::timestamptz[])

-- name: judge_inserted
-- Flag what is suspect among readings just inserted.
SELECT judge_inserted(%(device_class)s, %(device_ids)s::text[], %(ts)s::timestamptz[])

-- name: fetch_meter_readings
-- What is stored under these keys, or was until a correction took it out, by position. A statement of its
-- own, so that its snapshot also sees what another writer committed while the insert waited for it;
-- the bounds exclude chunks.
SELECT i.position, h.received_at, h.kwh_consumed_ac, h.voltage
FROM unnest(%(meter_id)s::text[], %(ts)s::timestamptz[])
  WITH ORDINALITY AS i (meter_id, ts, position)
JOIN meter_telemetry_history h ON h.meter_id = i.meter_id AND h.ts = i.ts
WHERE h.ts >= %(ts_min)s AND h.ts <= %(ts_max)s
UNION ALL
SELECT i.position, c.received_at, c.kwh_consumed_ac, c.voltage
FROM unnest(%(meter_id)s::text[], %(ts)s::timestamptz[])
  WITH ORDINALITY AS i (meter_id, ts, position)
JOIN corrected_meter_reading c ON c.meter_id = i.meter_id AND c.ts = i.ts

-- name: fetch_vehicle_readings
-- The same for vehicles.
SELECT i.position, h.received_at, h.soc, h.kwh_delivered_dc, h.battery_temp
FROM unnest(%(vehicle_id)s::text[], %(ts)s::timestamptz[])
  WITH ORDINALITY AS i (vehicle_id, ts, position)
JOIN vehicle_telemetry_history h ON h.vehicle_id = i.vehicle_id AND h.ts = i.ts
WHERE h.ts >= %(ts_min)s AND h.ts <= %(ts_max)s
UNION ALL
SELECT i.position, c.received_at, c.soc, c.kwh_delivered_dc, c.battery_temp
FROM unnest(%(vehicle_id)s::text[], %(ts)s::timestamptz[])
  WITH ORDINALITY AS i (vehicle_id, ts, position)
JOIN corrected_vehicle_reading c ON c.vehicle_id = i.vehicle_id AND c.ts = i.ts

-- name: quarantine_payloads
-- Keep what was not a reading: once for each sender, reason and bytes, with a count. A transaction that
-- is run again because its commit is in doubt does not count twice what it had counted.
INSERT INTO quarantine AS q (fingerprint, payload, payload_bytes, code, path, detail, device_id, key_id,
                             count, first_seen, last_seen)
SELECT fingerprint, payload, payload_bytes, code, path, detail, device_id, key_id,
       count, %(seen_at)s, %(seen_at)s
FROM unnest(
  %(fingerprint)s::bytea[], %(payload)s::bytea[], %(payload_bytes)s::bigint[], %(code)s::text[],
  %(path)s::text[], %(detail)s::text[], %(device_id)s::text[], %(key_id)s::text[],
  %(count)s::bigint[])
  AS r (fingerprint, payload, payload_bytes, code, path, detail, device_id, key_id, count)
ORDER BY fingerprint
ON CONFLICT (fingerprint) DO UPDATE
SET count = q.count + CASE WHEN %(is_repeated)s AND q.last_seen = excluded.last_seen THEN 0
                           ELSE excluded.count END,
    last_seen = greatest(q.last_seen, excluded.last_seen)
