-- name: fetch_performance
-- One row, or none where the vehicle was never heard of. Its meaning is in sql/30_performance.sql.
SELECT * FROM vehicle_performance_v1(%(vehicle_id)s, %(since)s, %(until)s)

-- name: fetch_series
-- A row a bucket, in order; none where the vehicle was never heard of.
SELECT * FROM vehicle_performance_series_v1(
  %(vehicle_id)s, %(since)s, %(until)s, %(bucket)s, %(time_zone)s)
