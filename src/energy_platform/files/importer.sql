-- name: fetch_kept
-- How far back this database keeps raw readings and rolls them up; NULL: without an end.
SELECT min((config ->> 'drop_after')::interval) FILTER (
         WHERE proc_name = 'policy_retention'
           AND hypertable_name IN ('meter_telemetry_history', 'vehicle_telemetry_history')) AS raw_retention,
       min((config ->> 'start_offset')::interval) FILTER (
         WHERE proc_name = 'policy_refresh_continuous_aggregate') AS refresh_start
FROM timescaledb_information.jobs

-- name: fetch_registers
-- Which of these devices count a register.
SELECT 'meter' AS class, meter_id AS device_id FROM meter
WHERE meter_id = ANY (%(meters)s) AND energy_kind = 'register'
UNION ALL
SELECT 'vehicle', vehicle_id FROM vehicle
WHERE vehicle_id = ANY (%(vehicles)s) AND energy_kind = 'register'
