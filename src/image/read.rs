//! The pipeline of a read: the first half of a write's. Resolve, then one transfer for each extent.

use super::Image;
use crate::error::Result;
use crate::format::GuestOffset;
use crate::storage::{Io, IoDst, total_dst};

impl Image {
    /// Reads into `pieces` from `offset`. See [`Image::read`].
    #[inline]
    pub async fn read_with<I: Io>(&self, io: &I, pieces: &[IoDst<'_>], offset: GuestOffset) -> Result<()> {
        self.status.check_read()?;
        let length = total_dst(pieces);
        let result = {
            let _pin = match self.try_enter() {
                Some(entered) => entered,
                None => self.enter().await,
            };
            self.check_range(offset, length)?;
            if length == 0 {
                return Ok(());
            }
            self.chain.read(io, pieces, offset, length).await
        };
        match result {
            Ok(()) => Ok(()),
            Err(e) => Err(self.note_error(io, e).await),
        }
    }
}
