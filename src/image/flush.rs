//! Making things durable, and closing.

use super::Image;
use super::status::{CLOSED, CORRUPT, POISONED, READ_ONLY, UNTOUCHED};
use crate::error::{Error, Result};
use crate::image::options::LogLevel;
use crate::storage::Io;
use crate::wait::lock;

impl Image {
    /// Makes all writes durable that were acknowledged before the call. See [`Image::flush`].
    pub async fn flush_with<I: Io>(&self, io: &I) -> Result<()> {
        if self.status.any(CLOSED) {
            return self.status.check_read();
        }
        if self.status.any(READ_ONLY) {
            return Ok(());
        }
        if self.status.any(POISONED) {
            return self.status.check_write();
        }
        let _entered = self.enter_entry().await;
        self.flush_entered(io).await
    }

    /// The flush itself, for who has entered the image already.
    pub(super) async fn flush_entered<I: Io>(&self, io: &I) -> Result<()> {
        let tables = self.active();
        if let Err(e) = tables.flush(io).await {
            return Err(self.note_error(io, e).await);
        }
        // Everything is durable. What is freed now only decides how much space can be used again; in a corrupt image,
        // what an entry let go may still be somebody's.
        if self.status.any(CORRUPT) {
            return Ok(());
        }
        match self.free_released(io).await? {
            Ok(()) => Ok(()),
            Err(e @ Error::Corrupt(_)) => Err(self.note_error(io, e).await),
            Err(e) => {
                self.log(
                    LogLevel::Warning,
                    &format!("freeing replaced clusters failed, and is tried again later: {e}"),
                );
                Ok(())
            }
        }
    }

    /// Frees what has been released durably, L2 tables in which nothing is left among it. The error inside is one of
    /// that; the one outside is of a flush that was needed on the way.
    async fn free_released<I: Io>(&self, io: &I) -> Result<Result<()>> {
        loop {
            match self.free_some(io).await {
                Ok(true) => return Ok(Ok(())),
                Ok(false) => {}
                Err(e) => return Ok(Err(e)),
            }
            if let Err(e) = self.active().flush(io).await {
                return Err(self.note_error(io, e).await);
            }
        }
    }

    /// Frees all that has been released, durably: what the file holds then has no leaks. For who is alone.
    pub(super) async fn free_all<I: Io>(&self, io: &I) -> Result<()> {
        let tables = self.active();
        loop {
            if let Err(e) = self.free_released(io).await? {
                return Err(self.note_error(io, e).await);
            }
            if !tables.refcounts.with(|state| state.waits_for_write()) {
                return Ok(());
            }
            tables.flush(io).await?; // which may set free the clusters of a refcount table that moved
        }
    }

    /// `false`: the tables have to be flushed before it can go on.
    async fn free_some<I: Io>(&self, io: &I) -> Result<bool> {
        if !self.allocator.settle(io, self.active(), self.unmap).await? || self.drop_empty_tables(io).await? {
            return Ok(false);
        }
        self.punch_holes(io).await?;
        Ok(true)
    }

    /// Flushes, gives back what can be given back, and ends all use of the handle. See [`Image::close`].
    pub async fn close_with<I: Io>(&self, io: &I) -> Result<()> {
        let before = self.status.set(CLOSED);
        let result = self.finish(io, before).await;
        lock(&self.opened_as).take();
        lock(&self.lock).take(); // given back with its last holder
        result
    }

    async fn finish<I: Io>(&self, io: &I, before: u32) -> Result<()> {
        let untouched = before & (UNTOUCHED | POISONED) == UNTOUCHED;
        if before & (CLOSED | READ_ONLY) != 0 || untouched && !self.active().file.is_stopped() {
            return Ok(()); // nothing was written through this handle, and nobody was told that it cannot be
        }
        self.forget_inactive(); // bitmaps are about to be stored
        if before & POISONED != 0 {
            self.status.clear(CLOSED);
            let refusal = self.status.check_write();
            self.status.set(CLOSED);
            return refusal;
        }
        let tables = self.active();
        tables.refcounts.with(|state| state.holds_back = true);
        let given_back = match before & CORRUPT {
            0 => tables.refcounts.give_ahead_back(io, &tables.file).await,
            _ => Ok(()),
        };
        tables.flush(io).await?;
        match given_back {
            Err(e @ Error::Corrupt(_)) => return Err(self.note_error(io, e).await),
            Err(e) => self.log(LogLevel::Warning, &format!("clusters that nobody has taken stay counted: {e}")),
            Ok(()) => {}
        }
        if before & CORRUPT == 0 {
            if let Err(e) = self.store_bitmaps(io).await {
                return Err(self.note_error(io, e).await);
            }
            self.free_all(io).await?;
            if tables.refcounts.with(|state| state.has_freed || state.has_extended())
                && let Err(e) = self.trim_file(io).await
            {
                return Err(self.note_error(io, e).await);
            }
        }
        Ok(())
    }
}
