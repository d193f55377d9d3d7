-- depends: 0006_daily

-- A device's day becomes one run of columns. Late rows are still taken: they wait in the row store
-- of their chunk until the policy comes by again.

ALTER TABLE meter_telemetry_history SET (
  timescaledb.enable_columnstore, timescaledb.segmentby = 'meter_id', timescaledb.orderby = 'ts');

ALTER TABLE vehicle_telemetry_history SET (
  timescaledb.enable_columnstore, timescaledb.segmentby = 'vehicle_id', timescaledb.orderby = 'ts');
