-- The jobs of pg_cron, as its tables and settings have them. They are read, and left as they are.

-- name: where — has the database pg_cron? And its zone
SELECT to_regclass('cron.job') IS NOT NULL AS there, coalesce(current_setting('cron.timezone', true), 'GMT') AS zone,
    current_database()::text AS name;

-- name: jobs — in their order. jobname is of version 1.3 and newer
SELECT j.jobid, to_jsonb(j) ->> 'jobname' AS name, j.schedule, j.command, j.nodename, j.database, j.username, j.active
FROM cron.job AS j
ORDER BY j.jobid;
