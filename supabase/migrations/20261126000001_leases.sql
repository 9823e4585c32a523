-- Columns for the lease of a task, which users cannot write and which the database's clock measures. Explicit
-- grants for every role, since new projects have no default grants. May be applied repeatedly.

alter table public.segmentation_results
    add column if not exists attempt_id text,
    add column if not exists lease_s double precision,
    add column if not exists lease_until timestamptz;

-- For the search of tasks whose lease may have expired.
create index if not exists segmentation_results_lease
    on public.segmentation_results (lease_until) where status = 'processing';

-- Writing lease_s renews the lease, with the same value too; writing null ends it.
create or replace function public.segmentation_results_set_lease() returns trigger
language plpgsql
set search_path = ''
as $$
begin
    new.lease_until = now() + new.lease_s * interval '1 second';
    return new;
end
$$;

create or replace trigger segmentation_results_lease
    before insert or update of lease_s on public.segmentation_results
    for each row execute function public.segmentation_results_set_lease();

-- An older server or a user may set a row without a valid lease to processing. It gets a lease of 15 minutes,
-- so that it ends. The metadata hold an older server's attempt id; lease_s stays null.
create or replace function public.segmentation_results_set_default_lease() returns trigger
language plpgsql
set search_path = ''
as $$
begin
    new.attempt_id = substring(new.metadata ->> 'attempt' from '^[0-9a-f-]{36}$');
    new.lease_s = null;
    new.lease_until = now() + interval '15 minutes';
    return new;
end
$$;

-- After segmentation_results_lease: triggers fire in the order of their names.
create or replace trigger segmentation_results_lease_default
    before insert or update of status on public.segmentation_results
    for each row
    when (
        new.status = 'processing'
        and (new.lease_s is null or new.lease_until is null or new.lease_until <= now())
    )
    execute function public.segmentation_results_set_default_lease();

-- An insert cannot set updated_at.
create or replace trigger segmentation_results_insert_updated_at
    before insert on public.segmentation_results
    for each row execute function public.segmentation_results_set_updated_at();

-- The tasks that were processed when these columns were added.
update public.segmentation_results set status = status
    where status = 'processing' and lease_until is null;

-- The time that a lease is compared with, for clients of the API.
create or replace function public.segmentation_results_now() returns timestamptz
language sql
stable
set search_path = ''
as $$ select now() $$;

revoke all on function public.segmentation_results_now() from public, anon, authenticated;
grant execute on function public.segmentation_results_now() to service_role;

-- The table's grants: those of users, which row level security restricts to their own rows, and those of the
-- Edge and this server. Users may write all columns but those of leases, the application's own ones included.
do $$
declare
    users_columns text;
begin
    select string_agg(quote_ident(attname), ', ' order by attnum) into users_columns
    from pg_attribute
    where attrelid = 'public.segmentation_results'::regclass
        and attnum > 0 and not attisdropped and attgenerated = ''
        and attname not in ('attempt_id', 'lease_s', 'lease_until');

    revoke all on public.segmentation_results from anon, authenticated, service_role;
    grant select, delete on public.segmentation_results to authenticated;
    execute format(
        'grant insert (%1$s), update (%1$s) on public.segmentation_results to authenticated', users_columns
    );
    grant select, insert, update, delete on public.segmentation_results to service_role;

    -- For a role of supabase/optional/sam3_worker.sql that is older than these columns.
    if exists (select from pg_roles where rolname = 'sam3_worker') then
        grant select (attempt_id, lease_s, lease_until), update (attempt_id, lease_s)
            on public.segmentation_results to sam3_worker;
        grant execute on function public.segmentation_results_now() to sam3_worker;
    end if;
end
$$;
