using System.Text;
using MiniCpmNative.Engine;
using MiniCpmNative.Engine.Config;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

[TestFixture]
public sealed class JsonInputTests
{
    [Test]
    public void TypedValuesAreReadAndNullIsAbsent()
    {
        var root = Parse("""
            {"i": 3, "l": 9007199254740993, "n": -2.5e-1, "b": true, "t": "\u00e9\n", "z": null,
             "o": {"a": [1, {"k": "v"}]}}
            """);
        Assert.That(root["i"].Int(1, 3), Is.EqualTo(3));
        Assert.That(root["l"].Long(), Is.EqualTo(9007199254740993));
        Assert.That(root["n"].Number(), Is.EqualTo(-0.25));
        Assert.That(root["i"].Number(), Is.EqualTo(3));
        Assert.That(root["b"].Bool());
        Assert.That(root["t"].Text(), Is.EqualTo("é\n"));
        Assert.That(root.Find("z"), Is.Null);
        Assert.That(root.Find("absent"), Is.Null);
        var inner = root["o"]["a"].Items().Last();
        Assert.That(inner["k"].Text(), Is.EqualTo("v"));
        Assert.That(inner["k"].Path, Is.EqualTo("o.a[1].k"));
        Assert.That(root.Members().Select(m => m.Name),
            Is.EqualTo(new[] { "i", "l", "n", "b", "t", "z", "o" }));
    }

    [Test]
    public void AByteOrderMarkIsSkipped() =>
        Assert.That(Parse("\uFEFF{\"a\": 1}")["a"].Int(), Is.EqualTo(1));

    [Test]
    public void WrongValuesAreNamedWithTheirPath()
    {
        var root = Parse(
            """{"o": {"i": 2.5, "t": 7, "z": null, "big": 1e999, "a": [{}]}, "s": "xyz"}""");
        var o = root["o"];
        Refused(() => o["i"].Int(), "f.json: key \"o.i\" is 2.5, expected a whole number");
        Refused(() =>
            o["t"].Int(8, 9), "f.json: key \"o.t\" is 7, expected a whole number from 8 to 9");
        Refused(() => o["t"].Int(8), "f.json: key \"o.t\" is 7, expected a whole number from 8");
        Refused(() => o["t"].Text(), "f.json: key \"o.t\" is 7, expected text");
        Refused(() =>
            o["t"].Number(7.5, 8), "f.json: key \"o.t\" is 7, expected a number from 7.5 to 8");
        Refused(() => o["t"].Number(8), "f.json: key \"o.t\" is 7, expected a number from 8");
        Refused(() => o["big"].Number(), "f.json: key \"o.big\" is 1e999, expected a number");
        Refused(() => o["z"].Bool(), "f.json: key \"o.z\" is missing");
        Refused(() => o["a"].Bool(), "f.json: key \"o.a\" is an array, expected true or false");
        Refused(() => o["a"].Items().First().Items().ToList(),
            "f.json: key \"o.a[0]\" is an object, expected an array");
        Refused(() => root["s"].Find("x"), "f.json: key \"s\" is \"xyz\", expected an object");
        Refused(() => root["s"].Bool(), "f.json: key \"s\" is \"xyz\", expected true or false");
    }

    [TestCase("{\"a\": None}", "Python's None, True and False are null, true and false in JSON")]
    [TestCase("[True]", "Python's None, True and False are null, true and false in JSON")]
    [TestCase("{\"a\": NaN}", "NaN and Infinity are no JSON numbers")]
    [TestCase("{'a': 1}", "texts stand between double quotes, not single ones")]
    [TestCase("{\"a\": 1,}", "a comma stands in front of }")]
    [TestCase("{\"a\": 1, // one\n}", "JSON has no comments")]
    public void WhatOtherLanguagesHaveIsNamed(string json, string reason) =>
        Assert.That(Assert.Throws<InputException>(() => Parse(json))!.Message,
            Does.EndWith($"({reason})"));

    [TestCase("", "is empty, expected JSON")]
    [TestCase("{\n \"a\": }", "is not valid JSON at line 2, byte 7")]
    [TestCase("{\"a\": NaN}", "is not valid JSON at line 1, byte 7")]
    [TestCase("{} {}", "is not valid JSON")]
    [TestCase("""{"a": {"b": 1, "b": 2}}""", "key \"a.b\" is there twice")]
    [TestCase("""{"a": 1, "\u0061": 2}""", "key \"a\" is there twice")]
    [TestCase("""{"a": "\ud800"}""", "key \"a\" has an unpaired surrogate escape")]
    [TestCase("""{"a": {"\ud800": 1}}""", "key \"a\" has a name with an unpaired surrogate escape")]
    public void BrokenTextIsRefused(string json, string expected) =>
        Assert.That(() => Parse(json), SafetensorsTests.Refuses($"f.json: {expected}"));

    [Test]
    public void DeepNestingAndForeignBytesAreRefused()
    {
        string deep = string.Concat(Enumerable.Repeat("[", 5000));
        Assert.That(() => Parse(deep), SafetensorsTests.Refuses("f.json: is not valid JSON"));
        byte[] latin = [.. "{\"a\": \""u8, 0xE9, .. "\"}"u8];
        Assert.That(() =>
            JsonInput.Parse("f.json", latin), SafetensorsTests.Refuses("f.json: is not UTF-8"));
    }

    [Test]
    public void FilesAreBounded()
    {
        string folder = Directory.CreateTempSubdirectory("cpmx-test-").FullName;
        string path = Path.Combine(folder, "a.json");
        File.WriteAllText(path, "{\"a\": 1}");
        Assert.That(JsonInput.ReadObject(path)["a"].Int(), Is.EqualTo(1));
        Refused(() => JsonInput.ReadObject(path, 7), $"{path}: has 8 bytes, expected at most 7");
        Refused(() => JsonInput.ReadObject(folder), $"{folder}: is a directory, expected a file");
        Refused(() => JsonInput.ReadObject(path + "x"), $"{path}x: there is no such file");
        File.WriteAllText(path, "");
        Refused(() => JsonInput.ReadObject(path), $"{path}: is empty, expected JSON");
        File.WriteAllText(path, "[1]");
        Refused(() => JsonInput.ReadObject(path), $"{path}: is an array, expected an object");
        Directory.Delete(folder, recursive: true);
    }

    private static JsonValue Parse(string json) =>
        JsonInput.Parse("f.json", Encoding.UTF8.GetBytes(json));

    private static void Refused(Action read, string message) =>
        Assert.That(Assert.Throws<MiniCpmNative.Engine.InputException>(read)!.Message,
            Is.EqualTo(message));
}
