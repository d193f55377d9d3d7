-- name: fetch_performance
-- One row, or none where the vehicle was never heard of. Its meaning is in sql/30_performance.sql.
SELECT * FROM vehicle_performance_v1(%(vehicle_id)s, %(since)s, %(until)s)
