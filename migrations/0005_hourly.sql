-- depends: 0004_counter_increase

CREATE MATERIALIZED VIEW meter_hourly
WITH (timescaledb.continuous, timescaledb.materialized_only = false) AS
SELECT meter_id,
       time_bucket(INTERVAL '1 hour', ts)            AS hour,
       count(*)                                      AS readings,
       sum(kwh_consumed_ac)                          AS kwh_sum,
       counter_increase(kwh_consumed_ac ORDER BY ts) AS kwh_increase,
       first(kwh_consumed_ac, ts)                    AS kwh_first,
       min(ts)                                       AS ts_first,
       last(kwh_consumed_ac, ts)                     AS kwh_last,
       max(ts)                                       AS ts_last
FROM meter_telemetry_history
GROUP BY meter_id, time_bucket(INTERVAL '1 hour', ts)
WITH NO DATA;

CREATE MATERIALIZED VIEW vehicle_hourly
WITH (timescaledb.continuous, timescaledb.materialized_only = false) AS
SELECT vehicle_id,
       time_bucket(INTERVAL '1 hour', ts)             AS hour,
       count(*)                                       AS readings,
       sum(kwh_delivered_dc)                          AS kwh_sum,
       counter_increase(kwh_delivered_dc ORDER BY ts) AS kwh_increase,
       first(kwh_delivered_dc, ts)                    AS kwh_first,
       min(ts)                                        AS ts_first,
       last(kwh_delivered_dc, ts)                     AS kwh_last,
       max(ts)                                        AS ts_last,
       sum(battery_temp)                              AS battery_temp_sum,
       min(battery_temp)                              AS battery_temp_min,
       max(battery_temp)                              AS battery_temp_max
FROM vehicle_telemetry_history
GROUP BY vehicle_id, time_bucket(INTERVAL '1 hour', ts)
WITH NO DATA;
