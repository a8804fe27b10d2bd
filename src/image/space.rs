//! Giving space back to the file system: the end of the file, once nothing in it is in use.

use super::Image;
use super::alone::Alone;
use super::options::LogLevel;
use crate::alloc::tail::used_end;
use crate::error::{Error, Result};
use crate::format::HostCluster;
use crate::storage::Io;

impl Alone<'_> {
    /// Frees what has been released, and gives the end of the file back.
    pub(super) async fn give_back<I: Io>(&self, io: &I) -> Result<()> {
        self.flush(io).await?; // the entries are gone; counts are lowered
        self.flush(io).await?; // the counts are on disk
        self.image().trim_file(io).await
    }
}

impl Image {
    /// Cuts the file after the last cluster that is in use. For who has the image to himself, with nothing waiting to be
    /// written: no durable pointer leads to what is cut off, and nobody can be given it meanwhile. That it cannot be done
    /// costs space only; what it finds to be wrong is an error.
    pub(super) async fn trim_file<I: Io>(&self, io: &I) -> Result<()> {
        let tables = self.active();
        let (has_freed, untouched) =
            tables.refcounts.with(|state| (state.has_freed, state.untouched_from().filter(|_| state.has_extended())));
        let looks = self.unmap && has_freed;
        let cut = async {
            let end = match untouched {
                // What was made longer ahead and nobody had is known without a look at the counts.
                Some(untouched) if !looks => untouched,
                _ if looks => used_end(io, tables).await?,
                _ => return Ok(()),
            };
            if tables.refcounts.with(|state| state.waits_for_write()) {
                tables.flush(io).await?; // blocks were dropped
            }
            let end = tables.geometry.host_offset(HostCluster(end)).0;
            if tables.file.size_bytes()? > end {
                tables.file.set_size(end)?;
            }
            tables.refcounts.with(|state| state.note_cut());
            Ok(())
        };
        match cut.await {
            Err(e) if !matches!(e, Error::Corrupt(_)) => {
                self.log(LogLevel::Info, &format!("the end of the file is not given back: {e}"));
                Ok(())
            }
            result => result,
        }
    }
}
