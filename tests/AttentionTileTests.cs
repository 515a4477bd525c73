using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Ops;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>The list of attention's tiles that comes with a batch.</summary>
[TestFixture]
public sealed class AttentionTileTests
{
    // Sequences of 300, 0, 130 queries behind 10, 5, 0 keys more.
    private static readonly int[] StartsQ = [0, 300, 300, 430], StartsK = [0, 310, 315, 445];

    [Test]
    public void CausalQueriesThatSeeMostGoFirst() => Assert.That(
        List(causal: true, ofKeys: false), Is.EqualTo((int[][])
        [
            [0, 300, 0, 310, 0, 256, 0, 0], // sees 310 keys
            [0, 300, 0, 310, 0, 128, 0, 0], // 266
            [0, 300, 0, 310, 0, 0, 0, 0], // 138
            [300, 130, 315, 130, 2, 128, 0, 0], // 130
            [300, 130, 315, 130, 2, 0, 0, 0], // 128
        ]));

    [Test]
    public void CausalKeysThatMostQueriesSeeGoFirst() => Assert.That(
        List(causal: true, ofKeys: true), Is.EqualTo((int[][])
        [
            [0, 300, 0, 310, 0, 0, 0, 0], // seen by 300 queries
            [0, 300, 0, 310, 0, 128, 0, 0], // 182
            [300, 130, 315, 130, 2, 0, 0, 0], // 130
            [0, 300, 0, 310, 0, 256, 0, 0], // 54
            [300, 130, 315, 130, 2, 128, 0, 0], // 2
            [300, 0, 310, 5, 1, 0, 0, 0], // none
        ]));

    [Test]
    public void WithoutAMaskTheLongestSequencesGoFirst() => Assert.That(
        List(causal: false, ofKeys: false).Select(row => (row[4], row[5])),
        Is.EqualTo(((int, int)[])[(0, 0), (0, 128), (0, 256), (2, 0), (2, 128)]));

    [TestCase(new[] { 0, 3 }, "cu_seqlens_k has 2 numbers, expected 3")]
    [TestCase(new[] { 1, 3, 4 }, "cu_seqlens_k[0] is 1, expected to rise from 0")]
    [TestCase(new[] { 0, 5, 4 }, "cu_seqlens_k[2] is 4, expected to rise from 0")]
    public void WrongStartsAreRefused(int[] startsK, string message) => Assert.That(
        () => AttentionTiles.Fill(new int[16], [0, 1, 2], startsK, causal: true, ofKeys: false),
        Throws.TypeOf<ShapeException>().With.Message.Contains(message));

    private static int[][] List(bool causal, bool ofKeys)
    {
        var list = new int[
            AttentionTiles.Count(ofKeys ? StartsK : StartsQ) * AttentionTiles.Fields];
        AttentionTiles.Fill(list, StartsQ, StartsK, causal, ofKeys);
        return list.Chunk(AttentionTiles.Fields).ToArray();
    }
}
