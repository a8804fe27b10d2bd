//! Reading the header of an image.

use crate::error::{Error, IoOp, Result};
use crate::format::Header;
use crate::format::header::{first_cluster_bytes, holds_header};
use crate::storage::{Io, IoDst, Storage};

/// What is read first, and as a rule holds all that there is in the first cluster.
const FIRST_READ_BYTES: usize = 4096;

/// Reads and checks the header. What the image needs ([`Header::check_supported`]) and where its tables lie
/// ([`Header::check_placement`]) are the caller's to check: an inspection shows images that cannot be used.
pub async fn load_header<I: Io>(io: &I, storage: &dyn Storage) -> Result<Header> {
    Header::parse(&load_first_cluster(io, storage).await?)
}

/// As [`load_header`]; a refcount table that no image can have counts as one that is not there, which a repair makes
/// anew.
pub async fn load_header_leniently<I: Io>(io: &I, storage: &dyn Storage) -> Result<Header> {
    Header::parse_leniently(load_first_cluster(io, storage).await?)
}

/// The first cluster, or as much of it as a header can be parsed from with the same result.
async fn load_first_cluster<I: Io>(io: &I, storage: &dyn Storage) -> Result<Vec<u8>> {
    let mut bytes = vec![0; FIRST_READ_BYTES];
    read_up_to(io, storage, &mut bytes, 0).await?;
    // At most 2 MiB: the size has been checked.
    let cluster = first_cluster_bytes(&bytes)? as usize;
    bytes.truncate(cluster);
    if bytes.len() == FIRST_READ_BYTES && cluster > FIRST_READ_BYTES && !holds_header(&bytes) {
        let mut rest = vec![0; cluster - FIRST_READ_BYTES];
        read_up_to(io, storage, &mut rest, FIRST_READ_BYTES).await?;
        bytes.extend_from_slice(&rest);
    }
    Ok(bytes)
}

/// Reads to the end of `bytes` or of the storage, and cuts `bytes` there.
async fn read_up_to<I: Io>(io: &I, storage: &dyn Storage, bytes: &mut Vec<u8>, offset: usize) -> Result<()> {
    let done = io
        .read(storage, &[IoDst::from(bytes.as_mut_slice())], offset as u64)
        .await
        .map_err(|e| Error::io(IoOp::Read, offset as u64, &e))?;
    bytes.truncate(done);
    Ok(())
}
