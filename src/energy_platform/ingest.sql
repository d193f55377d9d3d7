-- The statements of the writer. A batch crosses the wire as one array per column.

-- name: insert_meter_readings
-- Add to history, move the live rows forward, register the devices that were not heard before.
-- Returns the positions (from 1) that were not inserted. Sorted, so that two writers lock in one order.
WITH incoming AS MATERIALIZED (
  SELECT * FROM unnest(
    %(meter_id)s::text[], %(ts)s::timestamptz[], %(kwh_consumed_ac)s::float8[], %(voltage)s::float8[])
  WITH ORDINALITY AS r (meter_id, ts, kwh_consumed_ac, voltage, position)
), stored AS (
  INSERT INTO meter_telemetry_history (meter_id, ts, kwh_consumed_ac, voltage, received_at)
  SELECT meter_id, ts, kwh_consumed_ac, voltage, %(received_at)s FROM incoming ORDER BY meter_id, ts
  ON CONFLICT DO NOTHING
  RETURNING *
), live AS (
  INSERT INTO meter_live_status AS live (meter_id, ts, kwh_consumed_ac, voltage, received_at)
  SELECT DISTINCT ON (meter_id) meter_id, ts, kwh_consumed_ac, voltage, received_at
  FROM stored ORDER BY meter_id, ts DESC
  ON CONFLICT (meter_id) DO UPDATE
  SET ts = excluded.ts, kwh_consumed_ac = excluded.kwh_consumed_ac, voltage = excluded.voltage,
      received_at = excluded.received_at
  WHERE live.ts < excluded.ts
  RETURNING meter_id, xmax = 0 AS first_heard
), registered AS (
  INSERT INTO meter (meter_id) SELECT meter_id FROM live WHERE first_heard ORDER BY meter_id
  ON CONFLICT DO NOTHING
)
SELECT i.position FROM incoming i
WHERE NOT EXISTS (SELECT FROM stored s WHERE s.meter_id = i.meter_id AND s.ts = i.ts)

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
  SELECT vehicle_id, ts, soc, kwh_delivered_dc, battery_temp, %(received_at)s
  FROM incoming ORDER BY vehicle_id, ts
  ON CONFLICT DO NOTHING
  RETURNING *
), live AS (
  INSERT INTO vehicle_live_status AS live
    (vehicle_id, ts, soc, kwh_delivered_dc, battery_temp, received_at)
  SELECT DISTINCT ON (vehicle_id) vehicle_id, ts, soc, kwh_delivered_dc, battery_temp, received_at
  FROM stored ORDER BY vehicle_id, ts DESC
  ON CONFLICT (vehicle_id) DO UPDATE
  SET ts = excluded.ts, soc = excluded.soc, kwh_delivered_dc = excluded.kwh_delivered_dc,
      battery_temp = excluded.battery_temp, received_at = excluded.received_at
  WHERE live.ts < excluded.ts
  RETURNING vehicle_id, xmax = 0 AS first_heard
), registered AS (
  INSERT INTO vehicle (vehicle_id) SELECT vehicle_id FROM live WHERE first_heard ORDER BY vehicle_id
  ON CONFLICT DO NOTHING
)
SELECT i.position FROM incoming i
WHERE NOT EXISTS (SELECT FROM stored s WHERE s.vehicle_id = i.vehicle_id AND s.ts = i.ts)

-- name: fetch_meter_readings
-- What is stored under these keys, by position. A statement of its own, so that its snapshot also
-- sees what another writer committed while the insert waited for it; the bounds exclude chunks.
SELECT i.position, h.received_at, h.kwh_consumed_ac, h.voltage
FROM unnest(%(meter_id)s::text[], %(ts)s::timestamptz[])
  WITH ORDINALITY AS i (meter_id, ts, position)
JOIN meter_telemetry_history h ON h.meter_id = i.meter_id AND h.ts = i.ts
WHERE h.ts >= %(ts_min)s AND h.ts <= %(ts_max)s

-- name: fetch_vehicle_readings
-- The same for vehicles.
SELECT i.position, h.received_at, h.soc, h.kwh_delivered_dc, h.battery_temp
FROM unnest(%(vehicle_id)s::text[], %(ts)s::timestamptz[])
  WITH ORDINALITY AS i (vehicle_id, ts, position)
JOIN vehicle_telemetry_history h ON h.vehicle_id = i.vehicle_id AND h.ts = i.ts
WHERE h.ts >= %(ts_min)s AND h.ts <= %(ts_max)s

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
