-- name: fetch_meter_page
-- The next readings of a device in the order of time. Pages by key and no cursor: a cursor's
-- transaction would keep everyone else from the embedded engine while the file is written.
SELECT meter_id, kwh_consumed_ac, voltage, ts FROM meter_telemetry_history
WHERE meter_id = %(device_id)s AND ts >= %(since)s AND ts < %(until)s
ORDER BY ts LIMIT %(limit)s

-- name: fetch_vehicle_page
SELECT vehicle_id, soc, kwh_delivered_dc, battery_temp, ts FROM vehicle_telemetry_history
WHERE vehicle_id = %(device_id)s AND ts >= %(since)s AND ts < %(until)s
ORDER BY ts LIMIT %(limit)s

-- name: fetch_meter_kind
SELECT energy_kind FROM meter WHERE meter_id = %(device_id)s

-- name: fetch_vehicle_kind
SELECT energy_kind FROM vehicle WHERE vehicle_id = %(device_id)s
