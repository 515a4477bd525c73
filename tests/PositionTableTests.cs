using System.Text.Json;
using MiniCpmNative.Engine;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Model;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

[TestFixture]
public sealed class PositionTableTests
{
    // rope_scaling.long_factor of MiniCPM-V-4's config.json.
    private static readonly double[] s_factorsOfV4 =
    [
        0.9977997200264581, 1.014658295992452, 1.0349680404997148, 1.059429246056193,
        1.0888815016813513, 1.1243301355211495, 1.166977103606075, 1.2182568066927284,
        1.2798772354275727, 1.3538666751582975, 1.4426259039919596, 1.5489853358570191,
        1.6762658237220625, 1.8283407612492941, 2.0096956085876183, 2.225478927469756,
        2.481536379650452, 2.784415934557119, 3.1413289096347365, 3.560047844772632,
        4.048719380066383, 4.615569542115128, 5.2684819496549835, 6.014438591970396,
        6.858830049237097, 7.804668263503327, 8.851768731513417, 9.99600492938444,
        11.228766118181639, 12.536757560834843, 13.902257701387796, 15.303885189125953,
        16.717837610115794, 18.119465097853947, 19.484965238406907, 20.792956681060105,
        22.02571786985731, 23.16995406772833, 24.217054535738416, 25.16289275000465,
        26.007284207271347, 26.753240849586767, 27.40615325712662, 27.973003419175363,
        28.461674954469114, 28.880393889607006, 29.237306864684626, 29.540186419591297,
        29.79624387177199, 30.01202719065413, 30.193382037992453, 30.34545697551969,
        30.47273746338473, 30.579096895249787, 30.66785612408345, 30.741845563814174,
        30.80346599254902, 30.85474569563567, 30.897392663720595, 30.932841297560394,
        30.962293553185553, 30.986754758742034, 31.007064503249293, 31.02392307921529,
    ];

    [Test]
    public void BucketsEqualPyTorch()
    {
        var reference = ReferenceFile.Open("ops/position_buckets");
        int count = 0;
        foreach (string name
            in reference.Names.Where(n => n.StartsWith("avx2/n", StringComparison.Ordinal)))
        {
            int n = int.Parse(name["avx2/n".Length..]);
            var row = new int[n];
            PositionBuckets.Write(1, n, 70, row);
            Assert.That(row, Is.EqualTo(reference.Ints(name)), name);
            count++;
        }

        Assert.That(count, Is.GreaterThan(150));
    }

    [Test]
    public void GridIdsEqualTheOfficialCode()
    {
        int count = 0;
        foreach (ReferenceCase c in ReferenceFile.Open("ops/position_gather").Cases)
        {
            JsonElement grid = c.Params.GetProperty("grid");
            if (grid.ValueKind != JsonValueKind.Array) continue;
            int h = grid[0].GetInt32(), w = grid[1].GetInt32();
            var ids = new int[h * w];
            PositionBuckets.Write(h, w, 70, ids);
            Assert.That(ids, Is.EqualTo(c.Ints("ids")));
            count++;
        }

        Assert.That(count, Is.GreaterThan(0));
    }

    [Test]
    public void SinCosTablesEqualTheOfficialCode()
    {
        foreach (ReferenceCase c in ReferenceFile.Open("ops/sincos_2d").Cases)
        {
            int[] shape = c.Shape("table");
            int half = shape[2] / 2;
            float[] table = SinCos2D.Coordinates(Math.Max(shape[0], shape[1]), shape[2]);
            double[] official = c.Doubles("table"), exact = c.Doubles("exact");
            for (int i = 0; i < exact.Length; i++)
            {
                // The column's row of the table, then the row's.
                int cell = i / shape[2], at = i % shape[2];
                int coordinate = at < half ? cell % shape[1] : cell / shape[1];
                float got = table[(coordinate * half) + (at % half)];
                Assert.That(got, Is.EqualTo(exact[i]).Within(6.1e-8), $"{c.Name}[{i}]");
                Assert.That(got, Is.EqualTo(official[i]).Within(2e-5), $"{c.Name}[{i}]");
            }
        }
    }

    [TestCase("default_64_10000", 64, 10000)]
    [TestCase("default_128_500000", 128, 500000)]
    [TestCase("default_128_1e+06", 128, 1e6)]
    [TestCase("longrope_128_10000", 128, 10000)]
    public void RopeTablesEqualTransformers(string name, int headDim, double theta)
    {
        var reference = ReferenceFile.Open("ops/rope");
        bool scaled = name.StartsWith("longrope", StringComparison.Ordinal);
        var decoder = new DecoderSpec(
            1, headDim, 1, 1, 1, 1, headDim, 1e-6f, false, false, theta,
            RopeScaling.None with { Short = scaled ? [.. s_factorsOfV4] : [] }, 4096);
        var (cos, sin) = decoder.RopeTable(4096);
        double[] frequencies = reference.Doubles($"table/{name}/inv_freq");
        double[] cosRows = reference.Doubles($"table/{name}/cos_rows");
        double[] sinRows = reference.Doubles($"table/{name}/sin_rows");
        int half = headDim / 2, r = 0;
        foreach (JsonElement row in reference.Index.GetProperty("tables").GetProperty(name)
            .GetProperty("rows").EnumerateArray())
        {
            int position = row.GetInt32();
            for (int k = 0; k < half; k++)
            {
                // A frequency one ulp off moves an angle by position * frequency * 2^-23.
                double tolerance = 1.2e-7 * (1 + (position * frequencies[k]));
                int at = (position * half) + k, expected = (r * half) + k;
                Assert.That(cos[at], Is.EqualTo(cosRows[expected]).Within(tolerance));
                Assert.That(sin[at], Is.EqualTo(sinRows[expected]).Within(tolerance));
            }

            r++;
        }

        Assert.That(r, Is.GreaterThan(5));
    }
}
