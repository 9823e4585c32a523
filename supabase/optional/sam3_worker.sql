-- A least-privilege role for this server, for a rented host; docs/supabase.md says how to use it.
-- It can read and settle tasks, and cannot insert, delete, or read images' URLs, prompts or other tables.
do $$
begin
    if not exists (select from pg_roles where rolname = 'sam3_worker') then
        create role sam3_worker nologin noinherit;
    end if;
end
$$;

grant sam3_worker to authenticator; -- PostgREST logs in as authenticator and takes the role of the JWT
grant usage on schema public to sam3_worker;

revoke all on public.segmentation_results from sam3_worker;
-- PostgREST's filters need the right to read: a claim filters by updated_at and user_id.
grant select (id, user_id, status, mask_image_url, labels, metadata, updated_at)
    on public.segmentation_results to sam3_worker;
grant update (status, mask_image_url, labels, metadata) on public.segmentation_results to sam3_worker;

-- The columns of leases, which supabase/migrations/20261126000001_leases.sql adds.
do $$
begin
    if to_regprocedure('public.segmentation_results_now()') is not null then
        grant select (attempt_id, lease_s, lease_until), update (attempt_id, lease_s)
            on public.segmentation_results to sam3_worker;
        grant execute on function public.segmentation_results_now() to sam3_worker;
    end if;
end
$$;

drop policy if exists "worker reads results" on public.segmentation_results;
create policy "worker reads results" on public.segmentation_results
    for select to sam3_worker using (true);

drop policy if exists "worker settles results" on public.segmentation_results;
create policy "worker settles results" on public.segmentation_results
    for update to sam3_worker using (true) with check (true);
