//! Raw external data files: at every moment, and after every crash, the data file alone is the disk (D14).
//!
//! The tables cannot be trusted with any part of that, because two files do not change at once. So they say as little
//! as can be: before the first write to a range that an L2 slice maps, all of the slice becomes "allocated", durably,
//! while the data file holds the zeroes that the guest has seen there all along. From then on the data file decides
//! alone, by writes in place; zeroing and discarding write or punch zeroes, and change no entry.

use std::sync::atomic::Ordering::Relaxed;

use super::Image;
use super::allocate::{ZERO_PIECES, ZEROES, zero_pieces};
use super::link::look_up;
use crate::error::{Error, Result};
use crate::format::{ClusterState, GuestOffset, Host, HostCluster, HostOffset, L2Entry};
use crate::storage::{Io, IoDst, IoSrc};

impl Image {
    /// Makes all entries of the slice at `at` "allocated", before any of its clusters is written to.
    pub(super) async fn allocate_ahead<I: Io>(&self, io: &I, at: GuestOffset) -> Result<()> {
        let tables = self.active();
        let geometry = tables.geometry;
        let first = geometry.guest_cluster(GuestOffset(at.0 - at.0 % geometry.slice_covers_bytes())).0;
        let covered = geometry.slice_covers_bytes() >> geometry.cluster_bits;
        let _claim = self.cluster_claims.claim(first..first + covered).await;
        self.check_range(at, 1)?; // the disk may have shrunk before the claim was had
        self.own_l2_table(io, geometry.l1_index(at)).await?;
        let end = geometry.clusters_for(self.size()).min(first + covered);
        let all = geometry.all_subclusters();
        let (mut entries, mut changed, mut hidden) = (Vec::new(), 0, 0..0);
        for cluster in first..end {
            let cluster_at = GuestOffset(cluster << geometry.cluster_bits);
            let state = look_up(io, tables, cluster_at).await?;
            changed += u64::from(state.alloc != all);
            for subcluster in (0..geometry.subclusters()).filter(|n| state.alloc & 1 << n == 0) {
                let from = cluster_at.0 + (u64::from(subcluster) << geometry.subcluster_bits());
                if hidden.end != from {
                    self.hide(io, hidden).await?;
                    hidden = from..from;
                }
                hidden.end += geometry.subcluster_size_bytes();
            }
            let host = Host::Cluster { cluster: HostCluster(cluster), copied: true };
            entries.push(L2Entry::encode(ClusterState { host, alloc: all, zero: 0 }, geometry));
        }
        self.hide(io, hidden).await?;
        if changed > 0 {
            tables.publish_ahead(io, geometry.slice_index(at), &entries).await?;
            self.counters.clusters_allocated.fetch_add(changed, Relaxed);
        }
        Ok(())
    }

    /// Makes sure that a range which reads as zeroes by its entries is zero in the data file as well: whoever wrote to
    /// the image before may have been less careful.
    async fn hide<I: Io>(&self, io: &I, range: std::ops::Range<u64>) -> Result<()> {
        let file = self.active().guest_file();
        let length = range.end - range.start;
        if length == 0 || file.zero_by_punching(io, HostOffset(range.start), length).await? {
            return Ok(());
        }
        let mut bytes = vec![0; ZEROES.len()];
        let mut at = range.start;
        while at < range.end {
            let n = (bytes.len() as u64).min(range.end - at) as usize;
            let got = file.read(io, &[IoDst::from(&mut bytes[..n])], HostOffset(at)).await?;
            if bytes[..got].iter().any(|&byte| byte != 0) {
                file.write_bytes(io, &ZEROES[..got], HostOffset(at)).await?;
            }
            if got < n {
                return Ok(()); // past the end everything is zero
            }
            at += n as u64;
        }
        Ok(())
    }

    /// Zeroes in the data file, and nowhere else. With `may_punch` its space is given up, where the storage can; without
    /// `may_write` it has to.
    pub(super) async fn zero_raw<I: Io>(
        &self,
        io: &I,
        offset: GuestOffset,
        length: u64,
        may_punch: bool,
        may_write: bool,
    ) -> Result<()> {
        let file = self.active().guest_file();
        let (mut at, end) = (offset.0, offset.0 + length);
        if may_punch && length > 0 {
            let _pin = self.enter().await;
            self.check_range(offset, length)?;
            self.record(io, offset, length).await?;
            if file.zero_by_punching(io, HostOffset(at), length).await? {
                return Ok(());
            }
        }
        if !may_write && length > 0 {
            return Err(Error::NoFallback);
        }
        while at < end {
            let mut pieces = [IoSrc::EMPTY; ZERO_PIECES];
            let n = zero_pieces(&mut pieces, end - at);
            let _pin = self.enter().await;
            self.check_range(GuestOffset(at), n)?;
            self.record(io, GuestOffset(at), n).await?;
            file.write(io, &pieces, HostOffset(at)).await?;
            at += n;
        }
        Ok(())
    }
}
