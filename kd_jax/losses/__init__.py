"""Losses: how each method is computed, as pure functions.

One loss in a file of its method's name, and its export below. `checks`
validates arguments, `softmax` compares predictions, `spatial` pools and resizes
maps. This room imports only JAX, NumPy and, for relational losses,
`kd_jax.distributed.collectives`.

Arrays come in the order student, teacher, labels; hyper-parameters are
keyword-only. Maps are NHWC. Everything is computed in float32. A loss returns
one value per example. Relational losses (SP) return a scalar for their batch
and take `axis_name`. No loss averages over the batch, stops a gradient or
applies a weight: the caller does.

>>> import jax, jax.numpy as jnp
>>> from kd_jax.losses import kd_loss
>>> student, teacher = jnp.zeros((2, 3)), jnp.ones((2, 3))
>>> kd_loss(student, teacher, temperature=4.0).shape
(2,)
"""

from kd_jax.losses import checks as checks
from kd_jax.losses.ab import ab_loss as ab_loss
from kd_jax.losses.at import at_loss as at_loss
from kd_jax.losses.bkd import bkd_loss as bkd_loss
from kd_jax.losses.catkd import catkd_loss as catkd_loss
from kd_jax.losses.cc import cc_loss as cc_loss
from kd_jax.losses.crd import ClassTable as ClassTable
from kd_jax.losses.crd import class_table as class_table
from kd_jax.losses.crd import crd_log_normalizer as crd_log_normalizer
from kd_jax.losses.crd import crd_loss as crd_loss
from kd_jax.losses.crd import crd_scores as crd_scores
from kd_jax.losses.crd import crd_update as crd_update
from kd_jax.losses.crd import draw_negatives as draw_negatives
from kd_jax.losses.crd import draw_positives as draw_positives
from kd_jax.losses.cross_entropy import cross_entropy_loss as cross_entropy_loss
from kd_jax.losses.ctkd import ctkd_loss as ctkd_loss
from kd_jax.losses.ctkd import ctkd_temperature as ctkd_temperature
from kd_jax.losses.ctkd import reversed_gradient as reversed_gradient
from kd_jax.losses.dist import dist_loss as dist_loss
from kd_jax.losses.dkd import dkd_loss as dkd_loss
from kd_jax.losses.fitnet import fitnet_loss as fitnet_loss
from kd_jax.losses.fsp import fsp_loss as fsp_loss
from kd_jax.losses.fsp import fsp_matrix as fsp_matrix
from kd_jax.losses.ft import ft_loss as ft_loss
from kd_jax.losses.ft import paraphraser_loss as paraphraser_loss
from kd_jax.losses.funmatch import funmatch_loss as funmatch_loss
from kd_jax.losses.ickd import ickd_loss as ickd_loss
from kd_jax.losses.ikl import ikl_loss as ikl_loss
from kd_jax.losses.kd import kd_loss as kd_loss
from kd_jax.losses.kdsvd import kdsvd_loss as kdsvd_loss
from kd_jax.losses.luminet import luminet_loss as luminet_loss
from kd_jax.losses.mgd import mgd_loss as mgd_loss
from kd_jax.losses.mgd import mgd_mask as mgd_mask
from kd_jax.losses.mlkd import mlkd_loss as mlkd_loss
from kd_jax.losses.nd import nd_loss as nd_loss
from kd_jax.losses.nkd import nkd_loss as nkd_loss
from kd_jax.losses.normkd import normkd_logits as normkd_logits
from kd_jax.losses.normkd import normkd_loss as normkd_loss
from kd_jax.losses.nst import nst_loss as nst_loss
from kd_jax.losses.ofa import ofa_loss as ofa_loss
from kd_jax.losses.ofd import ofd_loss as ofd_loss
from kd_jax.losses.ofd import ofd_margin as ofd_margin
from kd_jax.losses.pkt import pkt_loss as pkt_loss
from kd_jax.losses.reviewkd import reviewkd_loss as reviewkd_loss
from kd_jax.losses.rkd import rkd_loss as rkd_loss
from kd_jax.losses.rld import rld_loss as rld_loss
from kd_jax.losses.sdd import sdd_loss as sdd_loss
from kd_jax.losses.semckd import semckd_attention as semckd_attention
from kd_jax.losses.semckd import semckd_loss as semckd_loss
from kd_jax.losses.simkd import simkd_loss as simkd_loss
from kd_jax.losses.softmax import standardize_logits as standardize_logits
from kd_jax.losses.sp import similarity_matrix as similarity_matrix
from kd_jax.losses.sp import sp_loss as sp_loss
from kd_jax.losses.spatial import adaptive_average_pool as adaptive_average_pool
from kd_jax.losses.spatial import l2_normalize as l2_normalize
from kd_jax.losses.spatial import nearest_resize as nearest_resize
from kd_jax.losses.spatial import pool_to_smaller as pool_to_smaller
from kd_jax.losses.srd import srd_loss as srd_loss
from kd_jax.losses.srrl import srrl_loss as srrl_loss
from kd_jax.losses.tfkd import tfkd_loss as tfkd_loss
from kd_jax.losses.tfkd import tfkd_regularization as tfkd_regularization
from kd_jax.losses.ttm import ttm_loss as ttm_loss
from kd_jax.losses.vid import MIN_VARIANCE as MIN_VARIANCE
from kd_jax.losses.vid import vid_loss as vid_loss
from kd_jax.losses.vid import vid_variance as vid_variance
from kd_jax.losses.vitkd import vitkd_loss as vitkd_loss
from kd_jax.losses.wkd_f import wkd_f_loss as wkd_f_loss
from kd_jax.losses.wkd_l import wkd_decay as wkd_decay
from kd_jax.losses.wkd_l import wkd_l_cost as wkd_l_cost
from kd_jax.losses.wkd_l import wkd_l_loss as wkd_l_loss
from kd_jax.losses.wsld import wsld_loss as wsld_loss
from kd_jax.losses.wttm import wttm_loss as wttm_loss
