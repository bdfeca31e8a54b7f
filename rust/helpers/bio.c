// SPDX-License-Identifier: GPL-2.0

#include <linux/bio.h>

struct bio_vec rust_helper_bio_iter_next(const struct bio *bio,
					 struct bvec_iter *iter)
{
	struct bio_vec bvec = bio_iter_iovec(bio, *iter);

	bio_advance_iter_single(bio, iter, bvec.bv_len);
	return bvec;
}
