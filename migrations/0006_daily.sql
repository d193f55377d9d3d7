-- depends: 0005_hourly

CREATE MATERIALIZED VIEW meter_daily
WITH (timescaledb.continuous, timescaledb.materialized_only = false) AS
SELECT meter_id,
       time_bucket(INTERVAL '1 day', hour)                              AS day,
       sum(readings)::bigint                                            AS readings,
       sum(kwh_sum)                                                     AS kwh_sum,
       bucket_increase(kwh_increase, kwh_first, kwh_last ORDER BY hour) AS kwh_increase,
       first(kwh_first, hour)                                           AS kwh_first,
       min(ts_first)                                                    AS ts_first,
       last(kwh_last, hour)                                             AS kwh_last,
       max(ts_last)                                                     AS ts_last
FROM meter_hourly
GROUP BY meter_id, time_bucket(INTERVAL '1 day', hour)
WITH NO DATA;

CREATE MATERIALIZED VIEW vehicle_daily
WITH (timescaledb.continuous, timescaledb.materialized_only = false) AS
SELECT vehicle_id,
       time_bucket(INTERVAL '1 day', hour)                              AS day,
       sum(readings)::bigint                                            AS readings,
       sum(kwh_sum)                                                     AS kwh_sum,
       bucket_increase(kwh_increase, kwh_first, kwh_last ORDER BY hour) AS kwh_increase,
       first(kwh_first, hour)                                           AS kwh_first,
       min(ts_first)                                                    AS ts_first,
       last(kwh_last, hour)                                             AS kwh_last,
       max(ts_last)                                                     AS ts_last,
       sum(battery_temp_sum)                                            AS battery_temp_sum,
       min(battery_temp_min)                                            AS battery_temp_min,
       max(battery_temp_max)                                            AS battery_temp_max
FROM vehicle_hourly
GROUP BY vehicle_id, time_bucket(INTERVAL '1 day', hour)
WITH NO DATA;
