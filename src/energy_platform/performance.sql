-- name: fetch_performance
-- One row, or none where the vehicle was never heard of. Its meaning is in sql/30_performance.sql. Columns
-- are named, so that one more does not trouble a service that does not know it.
SELECT vehicle_id, since, until, total_kwh_consumed_ac, total_kwh_delivered_dc, efficiency_ratio,
       average_battery_temp, metered_kwh_delivered_dc, ac_readings, dc_readings, ac_coverage,
       dc_coverage, verdict, suspect_readings
FROM vehicle_performance_v1(%(vehicle_id)s, %(since)s, %(until)s)

-- name: fetch_series
-- A row a bucket, in order; none where the vehicle was never heard of.
SELECT vehicle_id, since, until, total_kwh_consumed_ac, total_kwh_delivered_dc, efficiency_ratio,
       average_battery_temp, metered_kwh_delivered_dc, ac_readings, dc_readings, ac_coverage,
       dc_coverage, verdict, suspect_readings
FROM vehicle_performance_series_v1(
  %(vehicle_id)s, %(since)s, %(until)s, %(bucket)s, %(time_zone)s)

-- name: fetch_fleet
-- A page of vehicles, each beside the figures of the whole fleet; these alone where the page is
-- empty. The same sums come out a last digit apart once an hour is rolled up, so the order is that of
-- ratios rounded to what the answers promise: a page then begins where the one before it ended.
WITH fleet AS MATERIALIZED (
  SELECT vehicle_id, since, until, total_kwh_consumed_ac, total_kwh_delivered_dc, efficiency_ratio,
         average_battery_temp, metered_kwh_delivered_dc, ac_readings, dc_readings, ac_coverage,
         dc_coverage, verdict, suspect_readings,
         efficiency_ratio IS NULL AS is_last,
         coalesce(round(efficiency_ratio::numeric, 9), 0) AS rank
  FROM fleet_performance_v1(%(since)s, %(until)s)
), totals AS (
  SELECT count(*) AS vehicles,
         sum(total_kwh_consumed_ac) AS fleet_total_kwh_consumed_ac,
         coalesce(sum(total_kwh_delivered_dc), 0) AS fleet_total_kwh_delivered_dc,
         coalesce(sum(metered_kwh_delivered_dc), 0) AS fleet_metered_kwh_delivered_dc,
         float_ratio(sum(metered_kwh_delivered_dc), sum(total_kwh_consumed_ac))
           AS fleet_efficiency_ratio,
         coalesce(sum(ac_readings), 0)::bigint AS fleet_ac_readings,
         coalesce(sum(dc_readings), 0)::bigint AS fleet_dc_readings
  FROM fleet
), counts AS (
  SELECT coalesce(jsonb_object_agg(verdict, vehicles), '{}') AS verdicts
  FROM (SELECT verdict, count(*) AS vehicles FROM fleet GROUP BY verdict) v
), page AS (
  SELECT * FROM fleet
  WHERE (%(verdict)s::text IS NULL OR verdict = %(verdict)s)
    AND (%(after_id)s::text IS NULL
         OR (is_last, rank, vehicle_id COLLATE "C")
            > (%(after_ratio)s::float8 IS NULL,
               coalesce(round(%(after_ratio)s::float8::numeric, 9), 0), %(after_id)s::text))
  ORDER BY is_last, rank, vehicle_id COLLATE "C"
  LIMIT %(limit)s
)
SELECT * FROM totals CROSS JOIN counts LEFT JOIN page ON true
ORDER BY is_last, rank, vehicle_id COLLATE "C"

-- name: fetch_sessions
-- A row a session, in order; one of NULLs where there is none, and no row where the vehicle was never
-- heard of.
SELECT s.*
FROM vehicle v LEFT JOIN LATERAL charging_session_v1(v.vehicle_id, %(since)s, %(until)s) s ON true
WHERE v.vehicle_id = %(vehicle_id)s
ORDER BY s.started_at
