-- name: put_meter
-- NULL leaves a field as it is.
INSERT INTO meter AS d (meter_id, energy_kind, reporting_interval)
VALUES (%(device_id)s, coalesce(%(energy_kind)s, 'interval'),
        coalesce(%(reporting_interval)s, INTERVAL '60 seconds'))
ON CONFLICT (meter_id) DO UPDATE
SET energy_kind = coalesce(%(energy_kind)s, d.energy_kind),
    reporting_interval = coalesce(%(reporting_interval)s, d.reporting_interval)
RETURNING energy_kind, reporting_interval, xmax = 0 AS made

-- name: put_vehicle
-- NULL leaves a field as it is.
INSERT INTO vehicle AS d (vehicle_id, energy_kind, reporting_interval)
VALUES (%(device_id)s, coalesce(%(energy_kind)s, 'interval'),
        coalesce(%(reporting_interval)s, INTERVAL '60 seconds'))
ON CONFLICT (vehicle_id) DO UPDATE
SET energy_kind = coalesce(%(energy_kind)s, d.energy_kind),
    reporting_interval = coalesce(%(reporting_interval)s, d.reporting_interval)
RETURNING energy_kind, reporting_interval, xmax = 0 AS made

-- name: changes_meter
-- A row where a declaration would change what is declared of a device.
SELECT FROM meter
WHERE meter_id = %(device_id)s
  AND (coalesce(%(energy_kind)s, energy_kind) <> energy_kind
       OR coalesce(%(reporting_interval)s, reporting_interval) <> reporting_interval)

-- name: changes_vehicle
SELECT FROM vehicle
WHERE vehicle_id = %(device_id)s
  AND (coalesce(%(energy_kind)s, energy_kind) <> energy_kind
       OR coalesce(%(reporting_interval)s, reporting_interval) <> reporting_interval)

-- name: hold_ingest
SELECT hold_ingest(%(device_class)s)

-- name: hold_device
SELECT hold_device(%(device_class)s, %(device_id)s)

-- name: fetch_raw_chunks
SELECT range_start, range_end FROM timescaledb_information.chunks
WHERE hypertable_schema = 'public' AND hypertable_name = %(device_class)s || '_telemetry_history'
ORDER BY range_start

-- name: judge_range
SELECT judge_range(%(device_class)s, %(device_id)s, %(since)s, %(until)s)

-- name: fetch_meters
-- One device by its id, or a page of them in the order of their ids.
SELECT meter_id, energy_kind, reporting_interval FROM meter
WHERE (%(device_id)s::text IS NULL OR meter_id = %(device_id)s)
  AND (%(after)s::text IS NULL OR meter_id > %(after)s)
ORDER BY meter_id LIMIT %(limit)s

-- name: fetch_vehicles
SELECT vehicle_id, energy_kind, reporting_interval FROM vehicle
WHERE (%(device_id)s::text IS NULL OR vehicle_id = %(device_id)s)
  AND (%(after)s::text IS NULL OR vehicle_id > %(after)s)
ORDER BY vehicle_id LIMIT %(limit)s

-- name: fetch_live_meters
SELECT meter_id, ts, kwh_consumed_ac, voltage, received_at,
       greatest(0, extract(epoch FROM %(now)s - ts)::float8) AS stale_seconds
FROM meter_live_status
WHERE (%(device_id)s::text IS NULL OR meter_id = %(device_id)s)
  AND (%(after)s::text IS NULL OR meter_id > %(after)s)
ORDER BY meter_id LIMIT %(limit)s

-- name: fetch_live_vehicles
SELECT vehicle_id, ts, soc, kwh_delivered_dc, battery_temp, received_at,
       greatest(0, extract(epoch FROM %(now)s - ts)::float8) AS stale_seconds
FROM vehicle_live_status
WHERE (%(device_id)s::text IS NULL OR vehicle_id = %(device_id)s)
  AND (%(after)s::text IS NULL OR vehicle_id > %(after)s)
ORDER BY vehicle_id LIMIT %(limit)s

-- name: lock_ledger
-- One writer at a time, readers as ever: two exclusion constraints may deadlock writers otherwise.
LOCK TABLE charging_assignment IN SHARE ROW EXCLUSIVE MODE

-- name: register_meter
-- A device that was never declared is registered by its first assignment; the meter first, as the
-- writer does.
INSERT INTO meter (meter_id) VALUES (%(meter_id)s) ON CONFLICT DO NOTHING

-- name: register_vehicle
INSERT INTO vehicle (vehicle_id) VALUES (%(vehicle_id)s) ON CONFLICT DO NOTHING

-- name: end_assignment
-- The same meter, vehicle and `since` again: only `until` is replaced.
UPDATE charging_assignment
SET during = CASE WHEN %(keeps_until)s THEN during ELSE tstzrange(%(since)s, %(until)s) END
WHERE meter_id = %(meter_id)s AND vehicle_id = %(vehicle_id)s AND lower(during) = %(since)s
RETURNING assignment_id, upper(during)

-- name: add_assignment
INSERT INTO charging_assignment (meter_id, vehicle_id, during)
VALUES (%(meter_id)s, %(vehicle_id)s, tstzrange(%(since)s, %(until)s))
RETURNING assignment_id, upper(during)

-- name: fetch_overlapping
-- The assignment that a refused one contradicts.
SELECT assignment_id, meter_id, vehicle_id, lower(during) AS since, upper(during) AS until
FROM charging_assignment
WHERE (meter_id = %(meter_id)s OR vehicle_id = %(vehicle_id)s)
  AND NOT (meter_id = %(meter_id)s AND vehicle_id = %(vehicle_id)s AND lower(during) = %(since)s)
  AND during && tstzrange(%(since)s, %(until)s)
ORDER BY lower(during) LIMIT 1

-- name: fetch_assignments
SELECT assignment_id, meter_id, vehicle_id, lower(during) AS since, upper(during) AS until
FROM charging_assignment
WHERE (%(meter_id)s::text IS NULL OR meter_id = %(meter_id)s)
  AND (%(vehicle_id)s::text IS NULL OR vehicle_id = %(vehicle_id)s)
  AND (%(after)s::bigint IS NULL OR assignment_id > %(after)s)
ORDER BY assignment_id LIMIT %(limit)s

-- name: delete_assignment
DELETE FROM charging_assignment WHERE assignment_id = %(assignment_id)s RETURNING assignment_id
