-- The statements of the writer. A batch crosses the wire as one array per column.

-- name: record_meter_readings
-- One transaction: the positions (from 1) of those that were not inserted. Arrays travel in binary: as
-- text they cost ten times as much here, and more there.
SELECT 'meter' AS kind, position FROM record_meter_readings(
  %(meter_id)b, %(meter_ts)b, %(kwh_consumed_ac)b, %(voltage)b, %(received_at)b) AS position

-- name: record_vehicle_readings
-- The same for vehicles.
SELECT 'vehicle' AS kind, position FROM record_vehicle_readings(
  %(vehicle_id)b, %(vehicle_ts)b, %(soc)b, %(kwh_delivered_dc)b, %(battery_temp)b, %(received_at)b)
  AS position

-- name: catch_up_meter_live
-- Live rows forward to the newest reading of history, where somebody has put that there by other ways.
WITH moved AS (
  INSERT INTO meter_live_status AS live (meter_id, ts, kwh_consumed_ac, voltage, received_at)
  SELECT h.meter_id, h.ts, h.kwh_consumed_ac, h.voltage, h.received_at
  FROM (SELECT DISTINCT unnest(%(device_ids)s::text[]) AS device_id) d, LATERAL (
    SELECT * FROM meter_telemetry_history m WHERE m.meter_id = d.device_id ORDER BY m.ts DESC LIMIT 1) h
  ORDER BY h.meter_id
  ON CONFLICT (meter_id) DO UPDATE
  SET ts = excluded.ts, kwh_consumed_ac = excluded.kwh_consumed_ac, voltage = excluded.voltage,
      received_at = excluded.received_at
  WHERE live.ts < excluded.ts
  RETURNING meter_id
)
INSERT INTO meter (meter_id) SELECT meter_id FROM moved ORDER BY meter_id ON CONFLICT DO NOTHING

-- name: catch_up_vehicle_live
-- The same for vehicles.
WITH moved AS (
  INSERT INTO vehicle_live_status AS live
    (vehicle_id, ts, soc, kwh_delivered_dc, battery_temp, received_at)
  SELECT h.vehicle_id, h.ts, h.soc, h.kwh_delivered_dc, h.battery_temp, h.received_at
  FROM (SELECT DISTINCT unnest(%(device_ids)s::text[]) AS device_id) d, LATERAL (
    SELECT * FROM vehicle_telemetry_history v WHERE v.vehicle_id = d.device_id
    ORDER BY v.ts DESC LIMIT 1) h
  ORDER BY h.vehicle_id
  ON CONFLICT (vehicle_id) DO UPDATE
  SET ts = excluded.ts, soc = excluded.soc, kwh_delivered_dc = excluded.kwh_delivered_dc,
      battery_temp = excluded.battery_temp, received_at = excluded.received_at
  WHERE live.ts < excluded.ts
  RETURNING vehicle_id
)
INSERT INTO vehicle (vehicle_id) SELECT vehicle_id FROM moved ORDER BY vehicle_id ON CONFLICT DO NOTHING

-- name: fetch_meter_readings
-- What is stored under these keys, or was until a correction took it out, by position. The bounds exclude
-- chunks.
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
