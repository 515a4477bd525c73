using MiniCpmNative.GpuEmulator;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Cuda;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// Attention's running softmax where scores are large, on the kernels of sm_80 and of sm_90a: one
/// row's maximum rises and its neighbours' do not, shares of a cache have maxima far apart, and
/// lse keeps the precision of its type.
/// </summary>
[TestFixture(80)]
[TestFixture(90)]
public sealed class CudaLargeScoreTests(int architecture)
{
    private const int HeadDim = 64;
    private static readonly DType[] s_types = [DType.F32, DType.BF16];

    private CudaUnderTest _cuda = null!;

    [OneTimeSetUp]
    public void Make()
    {
        if (CudaUnderTest.IsReal && architecture != 80) Assert.Ignore("the GPU is what it is");
        _cuda = new(new EmulatorOptions { Architecture = architecture });
    }

    [OneTimeTearDown]
    public void Free() => _cuda?.Dispose();

    // Of each sign a row of every fourth part of a tile, in another place of its warp: only these
    // rows' maxima rise, by more than a float holds, with an early key or with a late one.
    [Test]
    public void ARowMayRiseAlone()
    {
        const int Queries = 128, Keys = 150;
        AttentionProblem p =
            AttentionProblem.Random(1, 1, HeadDim, [Queries], [Keys], causal: false);
        Array.Clear(p.Q);
        foreach (int row in (int[])[3, 42, 85, 121]) Array.Fill(p.Q, 4, row * HeadDim, HeadDim);
        foreach (int row in (int[])[11, 34, 93, 113]) Array.Fill(p.Q, -4, row * HeadDim, HeadDim);
        Array.Fill(p.K, 4, 5 * HeadDim, HeadDim);
        Array.Fill(p.K, -4, (Keys - 5) * HeadDim, HeadDim);
        Compare(p);
    }

    // One head's scores are largest by far in the first share of the keys, the other's in the last.
    [Test]
    public void SharesOfACacheMayBeFarApart()
    {
        const int Keys = 600;
        AttentionProblem p = AttentionProblem.Random(
            2, 1, HeadDim, [1], [Keys], causal: true, [Keys]) with
        { Cached = true };
        Array.Fill(p.Q, 12, 0, HeadDim);
        Array.Fill(p.Q, -12, HeadDim, HeadDim);
        Array.Fill(p.K, 4, 5 * HeadDim, HeadDim);
        Array.Fill(p.K, -4, (Keys - 5) * HeadDim, HeadDim);
        Compare(p);
    }

    // All scores of a row are one number that products do not round: lse is it and ln of the keys.
    [Test]
    public void LseIsRoundedOnce()
    {
        const int Queries = 60, Keys = 70;
        AttentionProblem p =
            AttentionProblem.Random(1, 1, HeadDim, [Queries], [Keys], causal: false);
        Array.Clear(p.Q);
        Array.Clear(p.K);
        for (int query = 0; query < Queries; query++) p.Q[query * HeadDim] = 65 + (query / 2.0);
        for (int key = 0; key < Keys; key++) p.K[key * HeadDim] = 64;
        foreach (DType type in s_types)
        {
            using var run = new OpRun(
                _cuda.Device(type), CudaAttentionTests.OpOf(p), CudaAttentionTests.Inputs(p));
            run.Forward();
            double[] lse = run.Saved(0);
            for (int query = 0; query < Queries; query++)
            {
                double exact = (p.Q[query * HeadDim] * 64 * p.Scale) + Math.Log(Keys);
                double half = Math.ScaleB(1, Math.ILogB(exact) - 24);
                Assert.That(lse[query], Is.EqualTo(exact).Within(half + 2e-6), $"{type} {query}");
            }
        }
    }

    private void Compare(AttentionProblem problem)
    {
        foreach (DType type in s_types)
            CudaAttentionTests.Compare(problem, type, _cuda.Device(type));
    }
}
