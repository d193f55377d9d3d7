-- name: hold_ingest
SELECT hold_ingest(%(device_class)s)

-- name: allow_decompression
-- TimescaleDB lets a transaction unpack 100,000 readings. We bound a correction by what it changes,
-- but whole batches of up to 1,000 readings are unpacked for it.
SET LOCAL timescaledb.max_tuples_decompressed_per_dml_transaction = 0

-- name: fetch_meter_range
-- What is stored in a range, by time.
SELECT ts, kwh_consumed_ac, voltage FROM meter_telemetry_history
WHERE meter_id = %(device_id)s AND ts >= %(since)s AND ts < %(until)s
ORDER BY ts LIMIT %(limit)s

-- name: fetch_vehicle_range
SELECT ts, soc, kwh_delivered_dc, battery_temp FROM vehicle_telemetry_history
WHERE vehicle_id = %(device_id)s AND ts >= %(since)s AND ts < %(until)s
ORDER BY ts LIMIT %(limit)s

-- name: is_meter_corrected
-- Whether readings of a range were voided or replaced before.
SELECT EXISTS (SELECT FROM corrected_meter_reading
               WHERE meter_id = %(device_id)s AND ts >= %(since)s AND ts < %(until)s)

-- name: is_vehicle_corrected
SELECT EXISTS (SELECT FROM corrected_vehicle_reading
               WHERE vehicle_id = %(device_id)s AND ts >= %(since)s AND ts < %(until)s)

-- name: add_correction
INSERT INTO correction (device_class, device_id, during, action, reason, made_by, made_at, voided, stored)
VALUES (%(device_class)s, %(device_id)s, tstzrange(%(since)s, %(until)s), %(action)s, %(reason)s,
        %(made_by)s, %(made_at)s, %(voided)s, %(stored)s)
RETURNING correction_id

-- name: void_meter_readings
-- Move readings out of history, to where they are kept with their correction.
WITH voided AS (
  DELETE FROM meter_telemetry_history
  WHERE meter_id = %(device_id)s AND ts >= %(ts_min)s AND ts <= %(ts_max)s
    AND ts = ANY (%(ts)s::timestamptz[])
  RETURNING *
)
INSERT INTO corrected_meter_reading
  (meter_id, ts, kwh_consumed_ac, voltage, received_at, correction_id)
SELECT meter_id, ts, kwh_consumed_ac, voltage, received_at, %(correction_id)s FROM voided

-- name: void_vehicle_readings
WITH voided AS (
  DELETE FROM vehicle_telemetry_history
  WHERE vehicle_id = %(device_id)s AND ts >= %(ts_min)s AND ts <= %(ts_max)s
    AND ts = ANY (%(ts)s::timestamptz[])
  RETURNING *
)
INSERT INTO corrected_vehicle_reading
  (vehicle_id, ts, soc, kwh_delivered_dc, battery_temp, received_at, correction_id)
SELECT vehicle_id, ts, soc, kwh_delivered_dc, battery_temp, received_at, %(correction_id)s FROM voided

-- name: store_meter_readings
-- Put readings into history, after what was there has been taken out.
INSERT INTO meter_telemetry_history (meter_id, ts, kwh_consumed_ac, voltage, received_at)
SELECT meter_id, ts, kwh_consumed_ac, voltage, %(received_at)s
FROM unnest(%(meter_id)s::text[], %(ts)s::timestamptz[], %(kwh_consumed_ac)s::float8[],
            %(voltage)s::float8[]) AS r (meter_id, ts, kwh_consumed_ac, voltage)

-- name: store_vehicle_readings
INSERT INTO vehicle_telemetry_history
  (vehicle_id, ts, soc, kwh_delivered_dc, battery_temp, received_at)
SELECT vehicle_id, ts, soc, kwh_delivered_dc, battery_temp, %(received_at)s
FROM unnest(%(vehicle_id)s::text[], %(ts)s::timestamptz[], %(soc)s::float8[],
            %(kwh_delivered_dc)s::float8[], %(battery_temp)s::float8[])
  AS r (vehicle_id, ts, soc, kwh_delivered_dc, battery_temp)

-- name: follow_history
-- After readings of one device have changed between two instants: its live row and its flags.
SELECT reset_live(%(device_class)s, %(device_id)s, %(until)s),
       judge_range(%(device_class)s, %(device_id)s, %(since)s, %(until)s)

-- name: is_known
SELECT CASE %(kind)s WHEN 'meter' THEN EXISTS (SELECT FROM meter WHERE meter_id = %(device_id)s)
       ELSE EXISTS (SELECT FROM vehicle WHERE vehicle_id = %(device_id)s) END

-- name: refresh_rollup
CALL refresh_continuous_aggregate(%(rollup)s::regclass, %(since)s::timestamptz, %(until)s::timestamptz)

-- name: fetch_corrections
-- A page, newest first.
SELECT correction_id, action, lower(during) AS since, upper(during) AS until, reason, made_by, made_at,
       voided, stored,
       CASE device_class WHEN 'meter' THEN device_id END AS meter_id,
       CASE device_class WHEN 'vehicle' THEN device_id END AS vehicle_id
FROM correction
WHERE (%(meter_id)s::text IS NULL OR device_class = 'meter' AND device_id = %(meter_id)s)
  AND (%(vehicle_id)s::text IS NULL OR device_class = 'vehicle' AND device_id = %(vehicle_id)s)
  AND (%(before)s::bigint IS NULL OR correction_id < %(before)s)
ORDER BY correction_id DESC LIMIT %(limit)s

-- name: fetch_corrected_readings
-- What a correction took out, by time.
SELECT * FROM (
  SELECT ts, kwh_consumed_ac, voltage, NULL::float8 AS soc, NULL::float8 AS kwh_delivered_dc,
         NULL::float8 AS battery_temp, received_at
  FROM corrected_meter_reading WHERE correction_id = %(correction_id)s
  UNION ALL
  SELECT ts, NULL, NULL, soc, kwh_delivered_dc, battery_temp, received_at
  FROM corrected_vehicle_reading WHERE correction_id = %(correction_id)s) r
WHERE %(after)s::timestamptz IS NULL OR ts > %(after)s
ORDER BY ts LIMIT %(limit)s
