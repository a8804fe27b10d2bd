//! Changing what the header says beside the roots: extensions, features, the backing file's name.

use std::sync::Arc;

use super::Image;
use crate::error::Result;
use crate::format::header::Rewrite;
use crate::format::{Header, HostOffset};
use crate::image::options::LogLevel;
use crate::storage::{Io, IoDst};
use crate::wait::lock;

impl Image {
    /// Changes the header as `change` says, and makes that durable. What decides is one write of the first sector: a
    /// crash leaves the old header or the new one (D1). Where that cannot be had, nothing is changed.
    ///
    /// Only for who holds the image alone, or closes it, with no table waiting to be written. What the new header
    /// refers to is durable already. After an error the old header is in force, or the handle writes no more.
    pub(super) async fn rewrite_header<I: Io>(&self, io: &I, change: impl FnOnce(&mut Header)) -> Result<()> {
        let tables = self.active();
        let _only_one = self.header_claims.claim(0..1).await;
        let mut wanted = (*self.header()).clone();
        change(&mut wanted);
        // Where the refcount table is belongs to the passes.
        let (at, clusters) = tables.refcounts.with(|state| state.root());
        wanted.refcount_table_offset = at;
        wanted.refcount_table_clusters = clusters as u32;
        let mut cluster = vec![0; tables.geometry.cluster_size_bytes() as usize];
        let got = tables.file.read(io, &[IoDst::from(&mut cluster[..])], HostOffset(0)).await?;
        cluster.truncate(got);
        let Rewrite { before, sector, header } = wanted.rewrite(&cluster)?;
        for (at, bytes) in &before {
            tables.file.write_bytes(io, bytes, HostOffset(*at)).await?;
        }
        if !before.is_empty() {
            tables.sync(io).await?;
        }
        if let Err(e) = self.write_first_sector(io, &sector).await {
            let old = &cluster[..sector.len().min(cluster.len())];
            if self.write_first_sector(io, old).await.is_err() {
                self.poison("the header was being changed when writing failed, and which one is on disk is unknown");
                self.log(LogLevel::Error, "neither the new nor the old header of the image could be written");
            }
            return Err(e);
        }
        *lock(&self.header) = Arc::new(header);
        Ok(())
    }

    async fn write_first_sector<I: Io>(&self, io: &I, sector: &[u8]) -> Result<()> {
        let tables = self.active();
        tables.file.write_bytes(io, sector, HostOffset(0)).await?;
        tables.sync(io).await
    }
}
